"""What a worker process does: build the policy of a row, or run a part of its episodes.

Workers are processes beside this one (``processes.py``) or on a cluster (``ray_cluster.py``).  What
they are asked and what they answer are messages of JSON values and arrays (``channel.py``); the
answers are described in ``executor.py``.  Every request says which versions asked and how many
threads compute.  The same versions, threads and processor type give the same bits, which is why
others are refused: results of two releases would be mixed in one table.
"""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from omega_qvla import errors
from omega_qvla.errors import OmegaError, PolicyError, ResourceError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint
from omega_qvla.evaluation.execution.executor import Job
from omega_qvla.evaluation.execution.plan import OpenLoop
from omega_qvla.evaluation.openloop import Measurement, measure_reference, measure_row
from omega_qvla.evaluation.rollout import EvaluationError, run_groups
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


def request_of(job: Job, threads: int) -> Message:
    """What a worker in another process is asked.

    Args:
        threads: of its policy.

    Raises:
        PolicyError: only this process can build the row.
    """
    if job.blueprint is None:
        raise PolicyError(
            f"{job.row.label}: other processes do not know how to build it; give the row a "
            "blueprint, or evaluate it in this process"
        )
    loop, measured = job.plan.closed_loop, job.plan.open_loop
    request: Message = {
        "label": job.row.label,
        "threads": threads,
        "versions": versions(),
        "blueprint": asdict(job.blueprint),
    }
    if not job.groups:
        asked = None
        if measured is not None:
            asked = {
                "observations": list(measured.observations),
                "seed": measured.seed,
                "noises": measured.noises,
            }
        return {**request, "open_loop": asked, "normalized": job.normalized}
    assert loop is not None
    simulators = {
        "environment": loop.pool.environment,
        "options": loop.pool.options,
        "timeout_s": loop.pool.timeout_s,
        "python": loop.pool.python,
    }
    return {
        **request,
        "groups": [[task, list(seeds)] for task, seeds in job.groups],
        "execute": loop.execute,
        "together": loop.together,
        "simulators": simulators,
    }


def prepared(built: Built, open_loop: OpenLoop | None, normalized: bool | None) -> Message:
    """What is answered of a policy that was built: bytes, chunks, and how to build it again.

    Args:
        normalized: units of the reference's chunks; None: this is a reference and chooses.
    """
    measurement = None
    if open_loop is not None:
        given = built.policy, open_loop.observations, open_loop.seed, open_loop.noises
        if normalized is None:
            measurement = measure_reference(*given)
        else:
            measurement = measure_row(*given, normalized=normalized)
    return {
        "footprint": asdict(built.footprint),
        "measurement": None if measurement is None else asdict(measurement),
        "again": None if built.again is None else asdict(built.again),
    }


def parse_prepared(
    answer: Mapping[str, Any],
) -> tuple[Footprint, Measurement | None, Blueprint | None]:
    """The answer of :func:`prepared`."""
    measured, again = answer["measurement"], answer["again"]
    return (
        Footprint(**answer["footprint"]),
        None if measured is None else Measurement(**measured),
        None if again is None else Blueprint(**again),
    )


def error_from(label: str, error: Mapping[str, str]) -> OmegaError:
    """The error that a worker met, of its own kind, with the row's name."""
    message = f"{label}: {error['message']}"
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, OmegaError):
        return kind(message)
    return EvaluationError(message)


class Worker:
    """Answers the requests of one evaluation; keeps the last policy and its simulators."""

    def __init__(self) -> None:
        self._loaded: tuple[str | None, Built | None] = (None, None)
        self._pool: SimulatorPool | None = None

    def perform(self, request: Mapping[str, Any], emit: Emit) -> None:
        """Do what is asked; whatever goes wrong is the last answer.

        Raises:
            ChannelError: nobody listens any more.
        """
        try:
            _require_same_versions(request["versions"])
            torch.set_num_threads(request["threads"])
            if "groups" in request:
                self._run(request, emit)
            else:
                self._prepare(request, emit)
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
        asked = request["open_loop"]
        open_loop = None if asked is None else OpenLoop(**asked)
        built = self._built(request, emit)
        emit({"prepared": prepared(built, open_loop, request["normalized"])})

    def _run(self, request: Mapping[str, Any], emit: Emit) -> None:
        if self._pool is None:
            self._pool = SimulatorPool(request["together"], **request["simulators"])
        run_groups(
            self._built(request, emit).policy,
            [(task, tuple(seeds)) for task, seeds in request["groups"]],
            pool=self._pool,
            execute=request["execute"],
            together=request["together"],
            keep=lambda record: emit({"record": asdict(record)}),
        )
        emit({"done": True})

    def _built(self, request: Mapping[str, Any], emit: Emit) -> Built:
        label, built = self._loaded
        if built is None or label != request["label"]:
            self._loaded = (None, built := None)  # two policies at once may not fit
            built = Blueprint(**request["blueprint"]).build(
                lambda what, done, total: emit({"progress": [what, done, total]})
            )
            self._loaded = (request["label"], built)
        return built


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
