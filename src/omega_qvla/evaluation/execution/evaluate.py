"""The evaluation of rows: the same outcomes whoever does the work.

The work is cut into jobs: one per row that builds the policy, which is where recipes are quantized,
and then one per row, task and range of seeds, or one with all episodes of the row.  Rows wait for
the full-precision row they are compared with, since that decides the units; everything else may run
side by side.

**Nothing is counted twice and nothing is lost.**  Workers write no results.  Each finished episode
comes here and goes into the journal of its row; what the journal holds has happened, what it does
not hold has not.  When a worker dies, its job is started again with the episodes that the journal
lacks.  An episode is a function of its seed, so it does not matter who runs it, and a late answer
for an episode that is already in the journal changes nothing.  An interrupted evaluation may be
resumed with another executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.execution.blueprint import Blueprint, Footprint
from omega_qvla.evaluation.execution.executor import Death, Executor, Job, Reply
from omega_qvla.evaluation.execution.plan import ClosedLoop, Outcome, Plan, SweepRow
from omega_qvla.evaluation.execution.worker import error_from, parse_prepared
from omega_qvla.evaluation.openloop import Measurement
from omega_qvla.evaluation.rollout import MAX_DEATHS, EvaluationError, Group, journal_settings
from omega_qvla.results.episodes import EpisodeJournal, EpisodeRecord

Progress = Callable[[str, int, int], None]


def evaluate(plan: Plan, executor: Executor, progress: Progress) -> dict[str, Outcome]:
    """Outcomes of all rows, by label.

    Args:
        executor: closed when the evaluation ends, however it ends.
        progress: called with (what, done, all).

    Raises:
        PolicyError: a row cannot be built, or has no blueprint where other processes should.
        EvaluationError: workers died ``MAX_DEATHS`` times on one job; names it.
        ResourceError: the workers have other versions than this process, or cannot be reached.
        OmegaError: what building, measuring and simulating raise.
    """
    with ExitStack() as stack:
        stack.callback(executor.close)
        return _Evaluation(plan, executor, progress, stack).finish()


@dataclass
class _Row:
    """What is known of a row so far."""

    row: SweepRow
    again: Blueprint | None
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

    def lacks(self, group: Group) -> bool:
        """Whether any episode is missing; the group is run again as a whole then."""
        task, seeds = group
        return any((task, seed) not in self.finished for seed in seeds)


class _Evaluation:
    """The jobs of one evaluation."""

    def __init__(
        self, plan: Plan, executor: Executor, progress: Progress, stack: ExitStack
    ) -> None:
        self._plan, self._executor, self._progress = plan, executor, progress
        self._stack = stack
        self._rows = {row.label: _Row(row, row.blueprint) for row in plan.rows}
        self._jobs: dict[int, Job] = {}
        self._deaths: dict[int, int] = {}

    def finish(self) -> dict[str, Outcome]:
        """Run until nothing is left to do."""
        for row in self._rows.values():
            if row.row.is_reference:
                self._start(self._prepare(row))
        while self._jobs:
            self._executor.wait(self._hear)
        return {label: self._outcome(row) for label, row in self._rows.items()}

    def _prepare(self, row: _Row) -> Job:
        normalized = None
        if not row.row.is_reference:
            known = self._rows[self._plan.references[row.row.label].label].measurement
            normalized = known is not None and known.normalized
        return Job(self._plan, row.row, row.again, normalized)

    def _start(self, job: Job) -> None:
        number = len(self._deaths)
        self._jobs[number], self._deaths[number] = job, 0
        self._executor.start(number, job)

    def _hear(self, event: Reply | Death) -> None:
        if isinstance(event, Death):
            self._again(event)
            return
        job, message = self._jobs[event.job], event.message
        row = self._rows[job.row.label]
        if event.is_last:
            del self._jobs[event.job]
        if "progress" in message:
            self._progress(*message["progress"])
        elif "record" in message:
            row.keep(EpisodeRecord(**message["record"]))
            self._report(row)
        elif "prepared" in message:
            self._prepared(row, message["prepared"])
        elif "error" in message:
            raise error_from(job.row.label, message["error"])
        elif left := self._left(job):
            raise EvaluationError(f"{_name(job)}: the worker ended without {left}")

    def _prepared(self, row: _Row, answer: Mapping[str, Any]) -> None:
        """A policy is built: those that waited for it may follow, and its episodes run."""
        row.footprint, row.measurement, row.again = parse_prepared(answer)
        for other in self._rows.values():
            waited = self._plan.references[other.row.label] is row.row
            if waited and not other.row.is_reference:
                self._start(self._prepare(other))
        loop = self._plan.closed_loop
        if loop is None:
            return
        path, identity = journal_of(row.row, loop)
        if path is not None:
            settings = journal_settings(loop.pool, loop.execute, loop.together, identity)
            row.journal = self._stack.enter_context(EpisodeJournal(path, settings))
            row.finished.update(row.journal.records)
        self._report(row)
        left = [group for group in loop.groups() if row.lacks(group)]
        for groups in _portions(left, self._executor.seeds_per_job, loop.together):
            self._start(Job(self._plan, row.row, row.again, groups=groups))

    def _again(self, death: Death) -> None:
        """The worker is gone: the rest of its job goes to another one."""
        job = self._jobs[death.job]
        left = self._left(job)
        if job.groups and not left:
            del self._jobs[death.job]
            return
        self._deaths[death.job] += 1
        if self._deaths[death.job] >= MAX_DEATHS:
            raise EvaluationError(
                f"{_name(job)}: {MAX_DEATHS} workers died on it, the last one {death.cause}; check "
                "the memory of the machines and the workers' own messages"
            )
        self._executor.start(death.job, replace(job, groups=left))

    def _left(self, job: Job) -> list[Group]:
        row = self._rows[job.row.label]
        return [group for group in job.groups if row.lacks(group)]

    def _report(self, row: _Row) -> None:
        episodes = [(task, seed) for task, seeds in self._plan.groups() for seed in seeds]
        done = sum(episode in row.finished for episode in episodes)
        self._progress(row.row.label, done, len(episodes))

    def _outcome(self, row: _Row) -> Outcome:
        groups = self._plan.groups()
        episodes = [row.finished[task, seed] for task, seeds in groups for seed in seeds]
        return Outcome(episodes, row.measurement, row.footprint)


def journal_of(row: SweepRow, closed_loop: ClosedLoop) -> tuple[Path | None, dict[str, Any]]:
    """The journal of a row's episodes, and the identity that its first line must agree with."""
    labels = {"policy": row.policy, "recipe": row.recipe, "condition": row.condition}
    folder = closed_loop.journals
    name = "".join(char if char.isalnum() or char in "-." else "_" for char in row.label)
    path = None if folder is None else folder / f"{name}.jsonl"
    labels |= {} if row.scope is None else {"scope": row.scope}
    labels |= {} if row.recipe_hash is None else {"recipe_hash": row.recipe_hash}
    return path, {**labels, **closed_loop.identity}


def _portions(groups: list[Group], seeds: int | None, together: int) -> list[list[Group]]:
    """Whole groups of about so many seeds of one task; all of them without a number."""
    if seeds is None:
        return [groups] if groups else []
    size = -(-seeds // together)
    found: list[list[Group]] = []
    for task in dict.fromkeys(task for task, _ in groups):
        mine = [group for group in groups if group[0] == task]
        found += [mine[first : first + size] for first in range(0, len(mine), size)]
    return found


def _name(job: Job) -> str:
    if not job.groups:
        return job.row.label
    first, last = job.groups[0][1][0], job.groups[-1][1][-1]
    return f"{job.row.label}, {job.task}, seeds {first} to {last}"
