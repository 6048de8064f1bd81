"""Workers on this machine: plain processes, each with a policy and a simulator of its own.

A policy answers one observation at a time, mostly on one core, and waits while its simulator steps
and renders.  Several such pairs keep all cores busy, at the price of one policy in memory each.
A worker that comes free gets a job of the row it has already loaded, if there is one, and of the
row's tasks the one its simulators stand at.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

from omega_qvla.evaluation.execution.executor import Death, Reply
from omega_qvla.evaluation.execution.worker import PROGRAM
from omega_qvla.evaluation.simulators.channel import ChannelError
from omega_qvla.evaluation.simulators.child import Child, wait_for_replies

_SILENCE_S = 7 * 86400.0
"""Quantizing a large policy may be silent for hours; a dead worker shows at once all the same."""
_DEATH_S = 0.3


class LocalCrew:
    """``workers`` processes, started when there is work for them.

    Args:
        workers: number of processes, at least one.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"a comparison needs at least one worker, got {workers}")
        self._limit = workers
        self._queue: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, int] = {}

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.pid for worker in [*self._idle, *self._busy] if worker.alive]

    def start(self, job: int, request: Mapping[str, Any]) -> None:
        """See :class:`crew.Crew`."""
        self._queue.append((job, request))

    def wait(self) -> Reply | Death:
        """See :class:`crew.Crew`."""
        while True:
            lost = self._assign()
            if lost is not None:
                return lost
            ready, late = wait_for_replies(self._busy)
            for worker in late:
                return self._bury(worker)
            for worker in ready:
                return self._hear(worker)

    def close(self) -> None:
        """See :class:`crew.Crew`."""
        self._queue.clear()
        for worker in [*self._idle, *self._busy]:
            worker.kill()
        self._idle.clear()
        self._busy.clear()

    def _assign(self) -> Death | None:
        """Give every free worker something to do."""
        while self._queue and len(self._busy) < self._limit:
            worker = self._idle.pop() if self._idle else _Worker()
            job, request = self._choose(worker)
            self._busy[worker] = job
            worker.label, worker.task = request["label"], request.get("task", worker.task)
            try:
                worker.request(request)
            except ChannelError:
                return self._bury(worker)
        return None

    def _choose(self, worker: _Worker) -> tuple[int, Mapping[str, Any]]:
        """The first job in the queue of those that cost this worker the least to begin."""
        labels = [request["label"] for _, request in self._queue]
        label = worker.label if worker.label in labels else labels[0]
        places = [place for place, one in enumerate(labels) if one == label]
        tasks = [self._queue[place][1].get("task") for place in places]
        chosen = places[tasks.index(worker.task) if worker.task in tasks else 0]
        found = self._queue[chosen]
        del self._queue[chosen]
        return found

    def _hear(self, worker: _Worker) -> Reply | Death:
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
