"""A sweep carried out by many workers: the same document as in one process.

The work is cut into jobs: one per row that builds the policy, which is where recipes are quantized,
and then one per row, task and range of seeds.  Rows wait for the full-precision row they are
compared with, since that decides the units; everything else runs side by side.

**Nothing is counted twice and nothing is lost.**  Workers write no results.  Each finished episode
comes here and goes into the journal of its row, the same file with the same identity as in a sweep
in one process; what the journal holds has happened, what it does not hold has not.  When a worker
dies, its job is started again with the episodes that the journal lacks.  An episode is a function
of its seed, so it does not matter who runs it, and a late answer for an episode that is already in
the journal changes nothing.  A sweep interrupted here may be resumed in one process, and the other
way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Footprint
from omega_qvla.evaluation.execution.executor import Crew, Death, Reply
from omega_qvla.evaluation.execution.worker import (
    episodes_request,
    error_from,
    parse_prepared,
    prepare_request,
)
from omega_qvla.evaluation.openloop import Measurement
from omega_qvla.evaluation.plan import Evaluate, Outcome, Plan, Progress, SweepRow, journal_of
from omega_qvla.evaluation.rollout import (
    MAX_DEATHS,
    EvaluationError,
    journal_settings,
    seed_groups,
)
from omega_qvla.results.episodes import EpisodeJournal, EpisodeRecord

SEEDS_PER_JOB = 50
"""A job loads policy and scenes once for at least so many episodes.

Jobs are whole groups of the episodes that advance together (``rollout.py``)."""


def evaluate_with(crew: Crew, *, threads: int = 1, seeds_per_job: int = SEEDS_PER_JOB) -> Evaluate:
    """An evaluation for :func:`sweep.run_sweep` that a crew carries out.

    Args:
        crew: closed when the evaluation ends, however it ends.
        threads: of each worker's policy; the same number as in one process gives the same bits.
        seeds_per_job: episodes of one task that a worker is given at once.

    Returns:
        A function that raises what ``evaluate_here`` raises, and also

        * PolicyError: a row without a blueprint, or observations that are changed on the way;
        * EvaluationError: workers died ``MAX_DEATHS`` times on one job; names it;
        * ResourceError: the workers have other versions than this process, or cannot be reached.
    """
    return partial(_evaluate, crew, threads, seeds_per_job)


def _evaluate(
    crew: Crew, threads: int, seeds_per_job: int, plan: Plan, progress: Progress
) -> dict[str, Outcome]:
    with ExitStack() as stack:
        stack.callback(crew.close)
        _require_portable(plan)
        return _Evaluation(crew, threads, seeds_per_job, plan, progress, stack).finish()


@dataclass
class _Row:
    """What is known of a row so far."""

    row: SweepRow
    again: Blueprint | None = None
    footprint: Footprint = field(default_factory=Footprint)
    measurement: Measurement | None = None
    finished: dict[tuple[str, int], EpisodeRecord] = field(
        default_factory=dict[tuple[str, int], EpisodeRecord]
    )
    journal: EpisodeJournal | None = None

    def keep(self, record: EpisodeRecord) -> None:
        """The first answer for an episode counts."""
        if record.key not in self.finished:
            if self.journal is not None:
                self.journal.append(record)
            self.finished[record.key] = record


@dataclass
class _Job:
    """Something a worker was asked for: a row's policy, or episodes of one of its tasks."""

    row: _Row
    task: str | None = None
    groups: Sequence[tuple[int, ...]] = ()
    deaths: int = 0

    @property
    def name(self) -> str:
        if self.task is None:
            return self.row.row.label
        seeds = f"seeds {self.groups[0][0]} to {self.groups[-1][-1]}"
        return f"{self.row.row.label}, {self.task}, {seeds}"

    def left(self) -> list[tuple[int, ...]]:
        """Groups of which the journal lacks any seed; such a group is run again as a whole."""
        finished = self.row.finished
        return [
            group
            for group in self.groups
            if any((self.task, seed) not in finished for seed in group)
        ]


class _Evaluation:
    """The jobs of one sweep."""

    def __init__(
        self,
        crew: Crew,
        threads: int,
        seeds_per_job: int,
        plan: Plan,
        progress: Progress,
        stack: ExitStack,
    ) -> None:
        self._crew, self._threads, self._seeds_per_job = crew, threads, seeds_per_job
        self._plan, self._progress, self._stack = plan, progress, stack
        self._rows = {row.label: _Row(row) for row in plan.rows}
        self._jobs: dict[int, _Job] = {}
        self._started = 0

    def finish(self) -> dict[str, Outcome]:
        """Run until nothing is left to do."""
        for row in self._rows.values():
            if row.row.is_reference:
                self._start(_Job(row))
        while self._jobs:
            event = self._crew.wait()
            if isinstance(event, Death):
                self._again(event)
            else:
                self._hear(event)
        return {label: self._outcome(row) for label, row in self._rows.items()}

    def _start(self, job: _Job) -> None:
        self._started += 1
        self._jobs[self._started] = job
        self._request(self._started, job)

    def _request(self, number: int, job: _Job) -> None:
        row, closed_loop = job.row, self._plan.closed_loop
        label, blueprint = row.row.label, row.again or row.row.blueprint
        assert blueprint is not None
        if job.task is None:
            request = prepare_request(
                label,
                blueprint,
                self._plan.open_loop,
                threads=self._threads,
                normalized=self._units(row.row),
            )
        else:
            assert closed_loop is not None
            request = episodes_request(
                label,
                blueprint,
                closed_loop.pool,
                job.task,
                [seed for group in job.left() for seed in group],
                threads=self._threads,
                execute=closed_loop.execute,
                together=closed_loop.together,
            )
        self._crew.start(number, request)

    def _units(self, row: SweepRow) -> bool | None:
        """Whether the reference was measured in normalized units; None for a reference."""
        if row.is_reference:
            return None
        known = self._rows[self._plan.references[row.label].label].measurement
        return known is not None and known.normalized

    def _hear(self, reply: Reply) -> None:
        job, message = self._jobs[reply.job], reply.message
        if reply.is_last:
            del self._jobs[reply.job]
        if "progress" in message:
            self._progress(*message["progress"])
        elif "record" in message:
            job.row.keep(EpisodeRecord(**message["record"]))
            self._report(job.row)
        elif "prepared" in message:
            self._prepared(job.row, message["prepared"])
        elif "error" in message:
            raise error_from(job.row.row.label, message["error"])
        elif job.left():
            raise EvaluationError(f"{job.name}: the worker ended without seeds {job.left()}")

    def _prepared(self, row: _Row, answer: Mapping[str, object]) -> None:
        """A policy is built: those that waited for it may follow, and its episodes run."""
        row.footprint, row.measurement, row.again = parse_prepared(answer)
        for other in self._rows.values():
            waited = self._plan.references[other.row.label] is row.row
            if waited and not other.row.is_reference:
                self._start(_Job(other))
        closed_loop = self._plan.closed_loop
        if closed_loop is None:
            return
        path, identity = journal_of(row.row, closed_loop)
        if path is not None:
            settings = journal_settings(
                closed_loop.pool, closed_loop.execute, closed_loop.together, identity
            )
            row.journal = self._stack.enter_context(EpisodeJournal(path, settings))
            row.finished.update(row.journal.records)
        self._report(row)
        together = closed_loop.together
        size = -(-self._seeds_per_job // together)
        groups = seed_groups(list(dict.fromkeys(closed_loop.seeds)), together)
        for task in dict.fromkeys(closed_loop.tasks):
            left = _Job(row, task, groups).left()
            for first in range(0, len(left), size):
                self._start(_Job(row, task, left[first : first + size]))

    def _again(self, death: Death) -> None:
        """The worker is gone: the rest of its job goes to another one."""
        job = self._jobs[death.job]
        if job.task is not None and not job.left():
            del self._jobs[death.job]
            return
        job.deaths += 1
        if job.deaths >= MAX_DEATHS:
            raise EvaluationError(
                f"{job.name}: {MAX_DEATHS} workers died on it, the last one {death.cause}; check "
                "the memory of the machines and the workers' own messages"
            )
        self._request(death.job, job)

    def _report(self, row: _Row) -> None:
        episodes = self._plan.episodes()
        done = sum(episode in row.finished for episode in episodes)
        self._progress(row.row.label, done, len(episodes))

    def _outcome(self, row: _Row) -> Outcome:
        episodes = [row.finished[episode] for episode in self._plan.episodes()]
        return Outcome(episodes, row.measurement, row.footprint)


def _require_portable(plan: Plan) -> None:
    for row in plan.rows:
        if row.blueprint is None:
            raise PolicyError(
                f"{row.label}: other processes do not know how to build it; give the row a "
                "blueprint, or evaluate it in this process"
            )
    if plan.closed_loop is not None and plan.closed_loop.transform is not None:
        raise PolicyError("observations that are changed on the way are evaluated in one process")
