"""What a worker process does for a comparison: prepare a row, or run a part of its episodes.

Workers are processes beside this one (``local_crew.py``) or on a cluster (``ray_crew.py``).  What
they are asked and what they answer are messages of JSON values and arrays (``channel.py``):

* ``{"kind": "prepare", "blueprint", "open_loop"}`` → ``{"prepared": ...}``: build the policy, which
  may quantize it, measure its bytes and its open-loop chunks, and say how to build it again;
* ``{"kind": "episodes", "blueprint", "simulators", "task", "seeds", "execute", "together"}`` →
  ``{"record": ...}`` per episode as it ends, then ``{"done": true}``;
* on the way ``{"progress": [label, done, total]}``;
* anything that raises → ``{"error": {"kind", "message"}}``, and that was the last answer.

Every request says which versions asked and how many threads compute.  The same versions, threads
and processor type give the same bits, which is why others are refused: results of two releases
would be mixed in one table.
"""

from __future__ import annotations

import json
import platform
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from omega_qvla import errors
from omega_qvla.errors import OmegaError, ResourceError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint
from omega_qvla.evaluation.openloop import Measurement, measure_reference, measure_row
from omega_qvla.evaluation.plan import OpenLoop
from omega_qvla.evaluation.rollout import EvaluationError, rollout
from omega_qvla.evaluation.simulators.channel import Channel, ChannelError
from omega_qvla.evaluation.simulators.pool import SimulatorPool

Message = dict[str, Any]
Emit = Callable[[Message], None]

PROGRAM = """
import sys

descriptor, *sys.path[:] = sys.argv[1:]

from omega_qvla.evaluation.execution.worker import serve
serve(int(descriptor))
"""
"""Program of a worker process: the socket's descriptor and the import path."""


def versions() -> dict[str, str]:
    """What must be the same everywhere for the same bits."""
    return {
        "omega-qvla": version("omega-qvla"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def prepare_request(
    label: str,
    blueprint: Blueprint,
    open_loop: OpenLoop | None,
    *,
    threads: int,
    normalized: bool | None,
) -> Message:
    """Ask for a row's policy.

    Args:
        normalized: units of the reference's chunks; None: this is a reference and chooses.
    """
    measured = None
    if open_loop is not None:
        measured = {
            "observations": list(open_loop.observations),
            "seed": open_loop.seed,
            "noises": open_loop.noises,
            "normalized": normalized,
        }
    return {**_request("prepare", label, blueprint, threads), "open_loop": measured}


def episodes_request(
    label: str,
    blueprint: Blueprint,
    pool: SimulatorPool,
    task: str,
    seeds: Sequence[int],
    *,
    threads: int,
    execute: int,
    together: int,
) -> Message:
    """Ask for the episodes of one task."""
    simulators = {
        "environment": pool.environment,
        "options": pool.options,
        "timeout_s": pool.timeout_s,
        "python": pool.python,
    }
    return {
        **_request("episodes", label, blueprint, threads),
        "task": task,
        "seeds": list(seeds),
        "execute": execute,
        "together": together,
        "simulators": simulators,
    }


def _request(kind: str, label: str, blueprint: Blueprint, threads: int) -> Message:
    return {
        "kind": kind,
        "label": label,
        "threads": threads,
        "versions": versions(),
        "blueprint": asdict(blueprint),
    }


def parse_prepared(
    prepared: Mapping[str, Any],
) -> tuple[Footprint, Measurement | None, Blueprint]:
    """What a worker answered to :func:`prepare_request`."""
    measured = prepared["measurement"]
    return (
        Footprint(**prepared["footprint"]),
        None if measured is None else Measurement(**measured),
        Blueprint(**prepared["again"]),
    )


def error_from(label: str, error: Mapping[str, str]) -> OmegaError:
    """The error that a worker met, of its own kind, with the row's name."""
    message = f"{label}: {error['message']}"
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, OmegaError):
        return kind(message)
    return EvaluationError(message)


class Worker:
    """Answers requests; keeps the last policy and its simulator for the next one."""

    def __init__(self) -> None:
        self._built: tuple[str, Built] | None = None
        self._pool: SimulatorPool | None = None

    def perform(self, request: Mapping[str, Any], emit: Emit) -> None:
        """Do what is asked; whatever goes wrong is the last answer.

        Raises:
            ChannelError: nobody listens any more.
        """
        try:
            _require_same_versions(request["versions"])
            torch.set_num_threads(request["threads"])
            if request["kind"] == "prepare":
                self._prepare(request, emit)
            else:
                self._run(request, emit)
        except ChannelError:
            raise
        except OmegaError as error:
            emit({"error": {"kind": type(error).__name__, "message": str(error)}})
        except Exception as error:
            text = f"{type(error).__name__}: {error} (on {socket.gethostname()})"
            emit({"error": {"kind": "EvaluationError", "message": text}})

    def close(self) -> None:
        """End the simulator."""
        if self._pool is not None:
            self._pool.kill()
            self._pool = None

    def _prepare(self, request: Mapping[str, Any], emit: Emit) -> None:
        self._built = None
        built = Blueprint(**request["blueprint"]).build(_reporter(emit))
        measured = request["open_loop"]
        measurement = None if measured is None else _measure(built, **measured)
        self._built = (_identity(built.again), built)
        prepared = {
            "footprint": asdict(built.footprint),
            "measurement": None if measurement is None else asdict(measurement),
            "again": asdict(built.again),
        }
        emit({"prepared": prepared})

    def _run(self, request: Mapping[str, Any], emit: Emit) -> None:
        blueprint = Blueprint(**request["blueprint"])
        identity = _identity(blueprint)
        if self._built is None or self._built[0] != identity:
            self._built = None  # two policies at once may not fit
            self._built = (identity, blueprint.build(_reporter(emit)))
        rollout(
            self._built[1].policy,
            [request["task"]],
            request["seeds"],
            pool=self._simulators(request["together"], **request["simulators"]),
            execute=request["execute"],
            together=request["together"],
            keep=lambda record: emit({"record": asdict(record)}),
        )
        emit({"done": True})

    def _simulators(
        self,
        count: int,
        environment: str,
        options: dict[str, Any],
        timeout_s: float,
        python: str | None,
    ) -> SimulatorPool:
        """As many as episodes advance together: they work while the policy waits, or it while
        they do.
        """
        pool = self._pool
        wanted = (count, environment, options, timeout_s, python)
        if pool is None or wanted != (
            pool.workers,
            pool.environment,
            pool.options,
            pool.timeout_s,
            pool.python,
        ):
            self.close()
            pool = SimulatorPool(count, environment, options, timeout_s=timeout_s, python=python)
            self._pool = pool
        return pool


def serve(descriptor: int) -> None:
    """Work for the parent process until it closes the channel."""
    channel = Channel(socket.socket(fileno=descriptor))
    worker = Worker()
    try:
        while True:
            worker.perform(channel.receive(), channel.send)
    except ChannelError:
        pass
    finally:
        worker.close()


def _measure(
    built: Built, observations: Sequence[Any], seed: int, noises: int, normalized: bool | None
) -> Measurement:
    if normalized is None:
        return measure_reference(built.policy, observations, seed, noises)
    return measure_row(built.policy, observations, seed, noises, normalized=normalized)


def _reporter(emit: Emit) -> Callable[[str, int, int], None]:
    return lambda label, done, total: emit({"progress": [label, done, total]})


def _identity(blueprint: Blueprint) -> str:
    """What tells two blueprints apart; arrays count by their bytes."""
    return json.dumps(asdict(blueprint), sort_keys=True, default=_bytes_of)


def _bytes_of(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tobytes().hex()]
    return str(value)


def _require_same_versions(asked: Mapping[str, str]) -> None:
    ours = versions()
    differences = [
        f"{name} {ours.get(name)} here, {asked.get(name)} there"
        for name in sorted({*ours, *asked})
        if ours.get(name) != asked.get(name)
    ]
    if differences:
        raise ResourceError(
            f"the worker on {socket.gethostname()} ({sys.executable}) is another installation than "
            f"the one that asked: {'; '.join(differences)}. Install the same versions everywhere"
        )
