"""Simulator processes as the evaluation holds them: started when needed, replaced when they die.

They usually run in this interpreter.  A simulator whose libraries cannot live beside this program's
(LIBERO wants an older numpy) runs in an interpreter of its own, which needs numpy and nothing of
ours: the sources are read from where this process has them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from omega_qvla.evaluation.simulators.child import Child
from omega_qvla.evaluation.simulators.metaworld_tasks import METAWORLD
from omega_qvla.evaluation.simulators.simulator_process import BOOTSTRAP

_SHUTDOWN_S, _DEATH_S = 3.0, 0.3
_PACKAGE = str(Path(__file__).resolve().parents[2])


class Simulator(Child):
    """One running simulator process.

    Args:
        python: the interpreter it runs in; None is this one, with its import path.
    """

    def __init__(self, timeout_s: float, python: str | None = None) -> None:
        own = python is None
        super().__init__(
            BOOTSTRAP,
            [_PACKAGE, *([*sys.path, os.getcwd()] if own else ())],
            timeout_s=timeout_s,
            python=sys.executable if python is None else python,
        )
        self.task: str | None = None


class SimulatorPool:
    """At most ``workers`` simulator processes, started when needed and kept between evaluations.

    Args:
        workers: number of processes.
        environment: factory as ``module:callable``, called as ``factory(task, **options)`` in the
            simulator process; it returns a ``gymnasium.Env`` (``environments.py``), perhaps with
            ``turn_to(task)`` where it can become another task for less than a new one costs (see
            ``metaworld.MetaWorldEnv``).  A module in the working directory is found too.
        options: keyword arguments of the factory, JSON values.
        timeout_s: a simulator silent for longer counts as dead; building an environment included.
        python: the interpreter the simulators run in; None is this one.
    """

    def __init__(
        self,
        workers: int = 2,
        environment: str = METAWORLD,
        options: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 300.0,
        python: str | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"an evaluation needs at least one worker, got {workers}")
        self.workers = workers
        self.environment = environment
        self.options: dict[str, Any] = dict(options or {})
        self.timeout_s = timeout_s
        self.python = python
        self._simulators: list[Simulator] = []

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close() if kind is None else self.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running simulators."""
        return [simulator.pid for simulator in self._simulators if simulator.alive]

    def idle(self, busy: Iterable[Simulator], limit: int) -> list[Simulator]:
        """Living simulators that are not busy, after starting as many as ``limit`` allows."""
        taken = {id(simulator) for simulator in busy}
        for simulator in list(self._simulators):
            if id(simulator) not in taken and not simulator.alive:
                self.discard(simulator)
        while len(self._simulators) < min(self.workers, limit):
            self._simulators.append(Simulator(self.timeout_s, self.python))
        return [simulator for simulator in self._simulators if id(simulator) not in taken]

    def start(self, simulator: Simulator, task: str, seed: int) -> None:
        """Ask a simulator to begin an episode.

        Raises:
            ChannelError: the process is gone.
        """
        simulator.task = task
        episode = {"task": task, "seed": seed}
        simulator.request(
            {"start": {"environment": self.environment, "options": self.options, **episode}}
        )

    def discard(self, simulator: Simulator) -> str:
        """Kill a simulator and forget it; returns how it had ended.

        Its channel stays open meanwhile: one that only then notices the end of it would seem to
        have ended by itself.
        """
        self._simulators.remove(simulator)
        ending = simulator.wait(_DEATH_S)
        simulator.channel.close()
        return ending

    def close(self) -> None:
        """Let every simulator finish and clean up."""
        for simulator in self._simulators:
            simulator.channel.close()
        for simulator in self._simulators:
            simulator.wait(_SHUTDOWN_S)
        self._simulators.clear()

    def kill(self) -> None:
        """End every simulator at once; the pool can be used again."""
        while self._simulators:
            self._simulators.pop().kill()
