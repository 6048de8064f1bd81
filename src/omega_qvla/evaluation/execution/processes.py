"""Workers on this machine: plain processes, each with a policy and a simulator of its own.

A policy answers one observation at a time, mostly on one core, and waits while its simulator steps
and renders.  Several such pairs keep all cores busy, at the price of one policy in memory each.
A worker that comes free gets a job of the row it has already loaded, if there is one, and of the
row's tasks the one its simulators stand at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from omega_qvla.evaluation.execution.executor import Death, Job, JobQueue, Reply
from omega_qvla.evaluation.execution.worker import PROGRAM, request_of
from omega_qvla.evaluation.simulators.channel import ChannelError
from omega_qvla.evaluation.simulators.child import Child, wait_for_replies

SEEDS_PER_JOB = 50
_SILENCE_S = 7 * 86400.0
"""Quantizing a large policy may be silent for hours; a dead worker shows at once all the same."""
_DEATH_S = 0.3


class ProcessExecutor:
    """``workers`` processes, started when there is work for them.

    Args:
        workers: number of processes, at least one.
        threads: of each worker's policy; the same number as in one process gives the same bits.
        seeds_per_job: episodes of one task that a worker is given at once.
    """

    def __init__(
        self, workers: int, *, threads: int = 1, seeds_per_job: int = SEEDS_PER_JOB
    ) -> None:
        if workers < 1:
            raise ValueError(f"a comparison needs at least one worker, got {workers}")
        self.description = f"{workers} processes, each with the policy and its simulators"
        self.seeds_per_job: int | None = seeds_per_job
        self._limit, self._threads = workers, threads
        self._queue = JobQueue()
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, int] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in [*self._idle, *self._busy] if worker.alive]

    def start(self, number: int, job: Job) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        self._queue.append(number, job)

    def wait(self, hear: Callable[[Reply | Death], None]) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        lost = self._assign()
        if lost is not None:
            hear(lost)
            return
        ready, late = wait_for_replies(self._busy)
        for worker in late:
            hear(self._bury(worker))
        for worker in ready:
            hear(self._receive(worker))

    def close(self) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        self._queue.clear()
        for worker in [*self._idle, *self._busy]:
            worker.kill()
        self._idle.clear()
        self._busy.clear()

    def _assign(self) -> Death | None:
        """Give every free worker something to do."""
        while self._queue and len(self._busy) < self._limit:
            worker = self._idle.pop() if self._idle else _Worker()
            number, job = self._queue.take(worker.label, worker.task)
            self._busy[worker] = number
            worker.label, worker.task = job.row.label, job.task or worker.task
            try:
                worker.request(request_of(job, self._threads))
            except ChannelError:
                return self._bury(worker)
        return None

    def _receive(self, worker: _Worker) -> Reply | Death:
        try:
            reply = Reply(self._busy[worker], worker.channel.receive())
        except ChannelError:
            return self._bury(worker)
        if reply.is_last:
            del self._busy[worker]
            self._idle.append(worker)
        return reply

    def _bury(self, worker: _Worker) -> Death:
        job = self._busy.pop(worker)
        ending = worker.wait(_DEATH_S)  # its channel still open, see SimulatorPool.discard
        worker.channel.close()
        return Death(job, ending)


class _Worker(Child):
    """One process, the row it has loaded and the task its simulators stand at."""

    def __init__(self) -> None:
        super().__init__(PROGRAM, sys.path, timeout_s=_SILENCE_S)
        self.label: str | None = None
        self.task: str | None = None
