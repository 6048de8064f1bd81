"""One simulator process: builds environments, steps physics, renders; it never sees the policy.

The parent starts ``python -c`` with :data:`BOOTSTRAP` and one end of a socket pair.  A plain
subprocess, rather than ``multiprocessing``, because the latter pickles its arguments and runs the
parent's main module again in the child, which here would load the whole library into every
simulator.  The process ends when the parent closes its end or dies.

Requests and replies (see ``channel.py``):

* ``{"start": {"environment", "options", "task", "seed"}}`` → ``{"observation", "low", "high"}``,
  the last two the limits of an action;
* ``{"actions": float32 [n, action_dim]}`` → ``{"success", "steps", "observation"}``, where
  ``steps`` counts the actions executed (fewer than n when the episode ended) and ``observation`` is
  None when it is over;
* anything that raises → ``{"error": {"kind", "message"}}``.

The environment is kept while the task stays the same, and asked to turn to another one if it can;
there is never more than one per process, because software renderers do not survive a second one.
"""

from __future__ import annotations

import importlib
import socket
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

from omega_qvla.environments import MOST_STEPS, Environment, action_limits, begin, carry_out
from omega_qvla.errors import (
    MissingPackageError,
    OmegaError,
    SimulatorError,
    SimulatorUnavailable,
)
from omega_qvla.evaluation.simulators.channel import Channel, ChannelError

BOOTSTRAP = """
import importlib.util, sys

descriptor, directory, *path = sys.argv[1:]
sys.path[:] = path or sys.path
spec = importlib.util.spec_from_file_location(
    "omega_qvla", directory + "/__init__.py", submodule_search_locations=[directory]
)
package = sys.modules["omega_qvla"] = importlib.util.module_from_spec(spec)

def load_on_demand(name):
    if name.startswith("__"):
        raise AttributeError(name)
    del package.__getattr__
    spec.loader.exec_module(package)
    return getattr(package, name)

package.__getattr__ = load_on_demand

from omega_qvla.evaluation.simulators.simulator_process import main
main(int(descriptor))
"""
"""Program of the subprocess: the socket's descriptor, where the package lies, the import path.

Without a path the interpreter keeps its own: it is another one than the parent's.

The package's public API imports torch, seconds and hundreds of megabytes that physics does not
need; here it is loaded only if an environment asks for it.
"""


@runtime_checkable
class HasTasks(Protocol):
    """An environment that can become another task for less than a new one would cost."""

    def turn_to(self, task: str) -> None: ...


def main(descriptor: int) -> None:
    """Serve one parent until it closes the channel."""
    channel = Channel(socket.socket(fileno=descriptor))
    server = _Server()
    try:
        while True:
            request = channel.receive()
            try:
                reply = server.answer(request)
            except Exception as error:
                reply = {"error": _describe(error)}
            channel.send(reply)
    except ChannelError:
        server.close()


class _Server:
    """The environment of one process and the episode that runs in it."""

    def __init__(self) -> None:
        self._built: tuple[Any, ...] | None = None
        self._environment: Environment | None = None
        self._steps = 0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        if "start" in request:
            return self._start(**request["start"])
        return self._act(request["actions"])

    def close(self) -> None:
        """Free the environment, if there is one."""
        self._built = None
        if self._environment is not None:
            environment, self._environment = self._environment, None
            environment.close()

    def _start(
        self, environment: str, options: dict[str, Any], task: str, seed: int
    ) -> dict[str, Any]:
        built, wanted = self._built, (environment, options, task)
        if self._environment is None or built != wanted:
            self._built = None  # whatever happens now, the next episode does not build on it
            same = built is not None and built[:-1] == wanted[:-1]
            if same and isinstance(self._environment, HasTasks):
                self._environment.turn_to(task)
            else:
                self.close()
                self._environment = import_factory(environment)(task, **options)
            self._built = wanted
        low, high = action_limits(self._environment)
        self._steps = 0
        return {"observation": begin(self._environment, seed), "low": low, "high": high}

    def _act(self, actions: Any) -> dict[str, Any]:
        if self._environment is None:
            raise RuntimeError("actions arrived before an episode was started")
        done = carry_out(self._environment, actions)
        self._steps += done.steps
        if done.observation is not None and self._steps >= MOST_STEPS:
            raise SimulatorError(
                f"the episode has run for {self._steps} steps and did not end: an environment must "
                "truncate, for example in gymnasium.wrappers.TimeLimit"
            )
        return {"success": done.success, "steps": done.steps, "observation": done.observation}


def import_factory(path: str) -> Callable[..., Environment]:
    """The environment factory that ``module:callable`` names.

    Raises:
        SimulatorUnavailable: it cannot be imported or is not callable.
    """
    try:
        return import_callable(path)
    except ImportError as error:
        raise SimulatorUnavailable(
            f"environment {path!r} cannot be imported: {error}; give it as 'module:callable'"
        ) from error


def import_callable(path: str) -> Callable[..., Any]:
    """What ``module:callable`` names.

    Raises:
        ImportError: there is no such module, it does not have the name, or it is not callable.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (AttributeError, ValueError) as error:
        raise ImportError(str(error)) from error
    if not callable(found):
        raise ImportError(f"{path!r} is not callable")
    return cast(Callable[..., Any], found)


def _describe(error: Exception) -> dict[str, str]:
    if isinstance(error, SimulatorUnavailable | MissingPackageError):
        return {"kind": "unavailable", "message": str(error)}
    if isinstance(error, SimulatorError):
        return {"kind": "fault", "message": str(error)}
    if isinstance(error, OmegaError):
        return {"kind": "failed", "message": str(error)}
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return {"kind": "failed", "message": f"{type(error).__name__}: {error}{where}"}
