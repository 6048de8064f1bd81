"""Workers on a Ray cluster: one Ray task per job.

Ray (Moritz et al., OSDI 2018) places the tasks, moves their bytes and notices dead processes and
machines.  Its own retries are off: after a death only ``evaluate.py`` knows which episodes have
arrived already.  What crosses the network are the messages of ``worker.py`` as bytes; the function
that answers them is imported on the worker, so the workers need the same installation.

A policy named by a path is read by the workers from that path, and the artifacts that they write
and read lie in the output directory: on more than one machine both have to be on a file system that
all of them share.  An artifact that is not what was written elsewhere is refused by its hash.

Whoever can reach the ports of a Ray cluster can run code on it, by design: see SECURITY.md.
"""

from __future__ import annotations

import importlib
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.execution.executor import Death, Job, Reply
from omega_qvla.evaluation.execution.processes import SEEDS_PER_JOB
from omega_qvla.evaluation.execution.worker import Worker, request_of
from omega_qvla.evaluation.simulators.channel import LENGTHS, decode, encode
from omega_qvla.extras import needing

LOCAL, AUTO = "local", "auto"
_CONNECT_S = 5.0


class RayExecutor:
    """Jobs as Ray tasks.

    Args:
        address: ``local`` starts Ray on this machine, for this run; ``auto`` joins the cluster that
            runs on it; ``HOST:PORT`` the cluster with that head node.
        threads: of each worker's policy, and the cores that Ray sets aside for it.
        cores: of a ``local`` Ray; None: all of this machine's.
        seeds_per_job: episodes of one task that a worker is given at once.

    Raises:
        ResourceError: Ray is not installed, the cluster cannot be reached, or it runs another
            version of Ray or Python.
    """

    def __init__(
        self,
        address: str,
        *,
        threads: int = 1,
        cores: int | None = None,
        seeds_per_job: int = SEEDS_PER_JOB,
    ) -> None:
        self._ray = _import_ray()
        self._join(address, cores)
        task = self._ray.remote(num_returns="streaming", max_retries=0, num_cpus=threads)
        self._answer = task(answer)
        self._threads = threads
        self.seeds_per_job: int | None = seeds_per_job
        self._running: dict[Any, int] = {}
        all_cores = int(self._ray.cluster_resources().get("CPU", 0))
        machines = len(self._ray.nodes())
        self.description = f"Ray {self._ray.__version__}: {machines} machine(s), {all_cores} cores"

    def start(self, number: int, job: Job) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        self._running[self._answer.remote(encode(request_of(job, self._threads)))] = number

    def wait(self, hear: Callable[[Reply | Death], None]) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        hear(self._next())

    def close(self) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()

    def _next(self) -> Reply | Death:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, fetch_local=False)
        (task,) = ready
        job = self._running[task]
        try:
            reply = Reply(job, _unpack(self._ray.get(next(task))))
        except StopIteration:
            del self._running[task]
            return Death(job, "ended without an answer")
        except self._ray.exceptions.RayTaskError as error:
            raise ResourceError(
                f"a Ray worker cannot work: {_first_line(error.cause)}. Install the same "
                "omega-qvla there as here"
            ) from error
        except self._ray.exceptions.RayError as error:
            del self._running[task]
            return Death(job, f"lost ({type(error).__name__}: {_first_line(error)})")
        if reply.is_last:
            del self._running[task]
        return reply

    def _join(self, address: str, cores: int | None) -> None:
        _require_reachable(address)
        started = {"num_cpus": cores, "include_dashboard": False} if address == LOCAL else {}
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR", **started)
        except (ConnectionError, TimeoutError) as error:
            raise ResourceError(_unreachable(address, error)) from error
        except (RuntimeError, ValueError) as error:
            raise ResourceError(f"Ray at {address!r} cannot be used: {_compact(error)}") from error


def answer(request: bytes) -> Iterator[bytes]:
    """The Ray task: carry out one request of ``worker.py``, one message of it at a time.

    The work happens in a thread of its own, because it reports through a callback and Ray takes
    answers from a generator.
    """
    worker, answers = Worker(), queue.SimpleQueue[bytes | None]()

    def work() -> None:
        try:
            worker.perform(_unpack(request), lambda message: answers.put(encode(message)))
        finally:
            worker.close()
            answers.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (message := answers.get()) is not None:
        yield message


def _unpack(message: bytes) -> dict[str, Any]:
    header, _ = LENGTHS.unpack_from(message)
    body = LENGTHS.size + header
    return decode(message[LENGTHS.size : body], bytearray(message[body:]))


def _import_ray() -> Any:
    with needing("running on a Ray cluster", "scale"):
        return importlib.import_module("ray")


def _require_reachable(address: str) -> None:
    """Find out in seconds what Ray itself takes a minute to say."""
    if address in (LOCAL, AUTO):
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdecimal():
        raise ResourceError(
            f"`ray={address}`: give local, auto, or HOST:PORT of the head node. Ray's client "
            "(ray://) cannot stream results; run this command on a machine of the cluster instead"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError, struct.error) as error:
        raise ResourceError(_unreachable(address, error)) from error


def _unreachable(address: str, error: Exception) -> str:
    if address == AUTO:
        return (
            "no Ray cluster runs on this machine: start one with `ray start --head`, join one with "
            "`ray start --address HOST:PORT`, or give `ray=local`"
        )
    return (
        f"no Ray cluster answers at {address} ({_first_line(error)}): start one there with `ray "
        "start --head --port PORT`, and look at firewalls between here and there"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _compact(error: BaseException) -> str:
    return " ".join(str(error).split())
