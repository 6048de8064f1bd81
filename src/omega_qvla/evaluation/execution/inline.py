"""Rows in this process, one after the other, with simulators that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.execution.blueprint import Built
from omega_qvla.evaluation.execution.executor import Death, Job, JobQueue, Reply
from omega_qvla.evaluation.execution.worker import prepared
from omega_qvla.evaluation.rollout import run_groups


class InlineExecutor:
    """Carries a job out when it is waited for; one policy is in memory at a time."""

    description = ""
    seeds_per_job: int | None = None

    def __init__(self) -> None:
        self._jobs = JobQueue()
        self._loaded: tuple[str | None, Built | None] = (None, None)

    def start(self, number: int, job: Job) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        self._jobs.append(number, job)

    def wait(self, hear: Callable[[Reply | Death], None]) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`.

        Raises:
            OmegaError: what the job raised.
        """
        number, job = self._jobs.take(self._loaded[0], None)

        def emit(message: dict[str, Any]) -> None:
            hear(Reply(number, message))

        built = self._built(job, emit)
        if not job.groups:
            try:
                answer = prepared(built, job.plan.open_loop, job.normalized)
            except PolicyError as error:
                raise PolicyError(f"{job.row.label}: {error}") from error
            emit({"prepared": answer})
            return
        loop = job.plan.closed_loop
        assert loop is not None
        run_groups(
            built.policy,
            job.groups,
            pool=loop.pool,
            execute=loop.execute,
            together=loop.together,
            keep=lambda record: emit({"record": asdict(record)}),
        )
        emit({"done": True})

    def close(self) -> None:
        """See :class:`~omega_qvla.evaluation.execution.executor.Executor`."""
        self._jobs.clear()
        self._loaded = (None, None)

    def _built(self, job: Job, emit: Callable[[dict[str, Any]], None]) -> Built:
        label, built = self._loaded
        if built is None or label != job.row.label:
            self._loaded = (None, built := None)  # two policies at once may not fit
            built = job.row.build(lambda what, done, total: emit({"progress": [what, done, total]}))
            self._loaded = (job.row.label, built)
        return built
