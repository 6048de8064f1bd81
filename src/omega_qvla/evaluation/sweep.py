"""Several recipes on the same episodes and observations, as one JSON document.

A sweep takes a list of :class:`SweepRow`: labels plus a function that builds the policy.  Rows run
one after the other, so only one policy needs to be in memory; of a full-precision row only its
chunks and outcomes are kept.  Every row is compared with the full-precision row (recipe ``fp32`` or
``bf16``) of the same policy and condition, or with the plain one if that condition has none:
action error, noise floor, smoothness, and success on the same seeds.

A sweep has three parts: which row is compared with which, where the rows are evaluated, and the
document.  Only the second differs between one process (:func:`evaluate_here`), several processes
and a cluster (``distributed.py``), so all of them give the same document.

Without a simulator the open-loop half still runs: pass ``pool=None`` and the closed-loop values are
empty or null.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla.errors import PolicyError, RecipeError
from omega_qvla.evaluation.blueprint import Blueprint, Footprint
from omega_qvla.evaluation.drift import hand_drift
from omega_qvla.evaluation.episodes import EpisodeRecord
from omega_qvla.evaluation.openloop import (
    NOISES,
    Array,
    Measurement,
    Sampler,
    error_shares,
    measure_reference,
    measure_row,
)
from omega_qvla.evaluation.rollout import Transform, rollout
from omega_qvla.evaluation.simulators import SimulatorPool
from omega_qvla.evaluation.statistics import (
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_total,
    compare_paired,
    relative_smoothness,
    wilson_interval,
)
from omega_qvla.recipe import DEFAULT_RECIPE

SCHEMA = 1
FULL_PRECISION = ("fp32", "bf16")
SMOKE_BELOW = 100
"""With fewer episodes than this on any task a row is marked as a smoke test."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SweepRow:
    """One line of the comparison.

    Attributes:
        policy: label of the policy.
        recipe: label of the recipe; ``fp32`` and ``bf16`` are full precision, the reference.
        build: returns the policy; called once, when the row's turn comes.
        condition: ``plain`` or ``stress:<magnitude>``.
        realizable: whether the recipe's integers can be multiplied as stored.
        footprint: measures the built policy; None leaves the bytes null.
        extra: further keys of the row, for example ``{"scope": "paper"}``; they identify it, so an
            interrupted sweep continues only where they are the same.
        derived: keys that follow from policy and recipe and identify nothing.
        blueprint: how another process builds the policy; None: only this one can.
        alone: it is its own reference, having nothing to be compared with.
    """

    policy: str
    recipe: str
    build: Callable[[], Sampler]
    condition: str = "plain"
    realizable: bool = True
    footprint: Callable[[Sampler], Footprint] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    derived: Mapping[str, Any] = field(default_factory=dict[str, Any])
    blueprint: Blueprint | None = None
    alone: bool = False

    @property
    def label(self) -> str:
        """For progress lines and messages."""
        return f"{self.policy}, {self.recipe}, {self.condition}"

    @property
    def is_reference(self) -> bool:
        """Whether others are compared with it: a full-precision row, or one that is alone."""
        return self.alone or self.recipe in FULL_PRECISION


@dataclass(frozen=True)
class ClosedLoop:
    """What the simulated half runs: every task with every seed."""

    pool: SimulatorPool
    tasks: Sequence[str]
    seeds: Sequence[int]
    execute: int = 5
    together: int = 1
    """Episodes that share the policy's passes, see ``rollout.py``."""
    transform: Transform | None = None
    journals: Path | None = None
    """Folder of one journal per row, so that an interrupted sweep continues; None keeps none."""
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else fixes the outcome (weights' hash, stress seed), checked when resuming."""


@dataclass(frozen=True)
class OpenLoop:
    """What the open-loop half runs: held-out observations, with noises drawn from ``seed``."""

    observations: Sequence[Any]
    seed: int = 0
    noises: int = NOISES
    """Per observation."""


@dataclass(frozen=True)
class Outcome:
    """What the evaluation of one row came to.

    Attributes:
        episodes: one record per task and seed, in order; empty without a simulator.
        measurement: the open-loop half; None if it did not run.
        footprint: bytes of the policy.
    """

    episodes: list[EpisodeRecord]
    measurement: Measurement | None
    footprint: Footprint


@dataclass(frozen=True)
class Plan:
    """What is to be evaluated.

    Attributes:
        rows: in the order given.
        references: label of each row → the full-precision row it is compared with.
    """

    rows: Sequence[SweepRow]
    references: Mapping[str, SweepRow]
    closed_loop: ClosedLoop | None
    open_loop: OpenLoop | None

    def episodes(self) -> list[tuple[str, int]]:
        """(task, seed) of every row, in order."""
        if self.closed_loop is None:
            return []
        seeds = list(dict.fromkeys(self.closed_loop.seeds))
        return [(task, seed) for task in dict.fromkeys(self.closed_loop.tasks) for seed in seeds]


Evaluate = Callable[[Plan, Progress], Mapping[str, Outcome]]
"""Evaluates every row of a plan; outcomes by label."""


def run_sweep(
    rows: Sequence[SweepRow],
    *,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """Evaluate every row.

    Args:
        progress: called with (row label, finished episodes, all episodes of the row).
        evaluate: where the rows are evaluated; None is :func:`evaluate_here`.

    Returns:
        The document of DESIGN's ``compare``: ``{"schema": 1, "policy": ..., "rows": [...]}``, rows
        in the order given.  Beside the contract's keys a row has ``smoke``, ``episodes``, ``drift``
        (``drift.py``), ``action_error_ci95`` (bootstrap over observations), ``action_errors`` (what
        each of them adds), ``error_vs_default`` (``{"ratio", "ci95"}``, paired; null without the
        default recipe and for itself) and ``paired_vs_reference`` (``{"episodes",
        "only_row", "only_reference", "difference", "ci95", "mcnemar_p"}``; null for references and
        without a simulator).  ``success_mean``
        is the rate over all episodes, with Wilson's interval.

    Raises:
        RecipeError: no rows, two rows with one label, or a row without a reference.
    """
    _check(rows)
    references = {row.label: _reference_of(row, rows) for row in rows}
    plan = Plan(rows, references, closed_loop, open_loop)
    outcomes = (evaluate or evaluate_here)(plan, progress or _silent)
    return {
        "schema": SCHEMA,
        "policy": ", ".join(dict.fromkeys(row.policy for row in rows)),
        "rows": [
            _assemble(row, outcomes[row.label], outcomes[references[row.label].label], closed_loop)
            | _open_loop_part(row, plan, outcomes)
            for row in rows
        ],
    }


def evaluate_here(plan: Plan, progress: Progress) -> dict[str, Outcome]:
    """Every row in this process, one after the other, full precision first."""
    outcomes: dict[str, Outcome] = {}
    for row in sorted(plan.rows, key=lambda row: not row.is_reference):
        policy = row.build()
        footprint = Footprint() if row.footprint is None else row.footprint(policy)
        measurement = None
        if plan.open_loop is not None:
            loop = plan.open_loop
            given = loop.observations, loop.seed, loop.noises
            if row.is_reference:
                measurement = measure_reference(policy, *given)
            else:
                known = outcomes[plan.references[row.label].label].measurement
                assert known is not None
                with _naming(row):
                    measurement = measure_row(policy, *given, normalized=known.normalized)
        closed_loop = plan.closed_loop
        episodes = [] if closed_loop is None else _run_episodes(row, policy, closed_loop, progress)
        outcomes[row.label] = Outcome(episodes, measurement, footprint)
    return outcomes


def journal_of(row: SweepRow, closed_loop: ClosedLoop) -> tuple[Path | None, dict[str, Any]]:
    """The journal of a row's episodes, and the identity that its first line must agree with."""
    labels = {"policy": row.policy, "recipe": row.recipe, "condition": row.condition}
    folder = closed_loop.journals
    path = None if folder is None else folder / f"{_file_name(row.label)}.jsonl"
    return path, {**labels, **row.extra, **closed_loop.identity}


def _check(rows: Sequence[SweepRow]) -> None:
    if not rows:
        raise RecipeError("nothing to compare: give at least one recipe")
    labels = [row.label for row in rows]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise RecipeError(f"given twice: {'; '.join(twice)}")


def _reference_of(row: SweepRow, rows: Sequence[SweepRow]) -> SweepRow:
    """The full-precision row that ``row`` is compared with; itself if it is one."""
    if row.is_reference:
        return row
    for condition in (row.condition, "plain"):
        for other in rows:
            if other.is_reference and (other.policy, other.condition) == (row.policy, condition):
                return other
    raise RecipeError(f"{row.label}: add the full-precision row (fp32 or bf16) to compare with")


def _run_episodes(
    row: SweepRow, policy: Sampler, closed_loop: ClosedLoop, progress: Progress
) -> list[EpisodeRecord]:
    journal, identity = journal_of(row, closed_loop)
    return rollout(
        policy,
        closed_loop.tasks,
        closed_loop.seeds,
        pool=closed_loop.pool,
        execute=closed_loop.execute,
        together=closed_loop.together,
        transform=closed_loop.transform,
        journal=journal,
        identity=identity,
        progress=lambda done, total: progress(row.label, done, total),
    )


@contextmanager
def _naming(row: SweepRow) -> Iterator[None]:
    """A policy that does not fit its reference is named."""
    try:
        yield
    except PolicyError as error:
        raise PolicyError(f"{row.label}: {error}") from error


def _silent(label: str, done: int, total: int) -> None:
    del label, done, total


def _open_loop_part(row: SweepRow, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Action error, its interval, what every observation adds to it, and the noise floor."""
    if plan.open_loop is None:
        names = ("noise_floor", "noises", "action_errors", "error_vs_default")
        return dict.fromkeys(("action_error", "action_error_ci95", *names))
    reference = plan.references[row.label]
    theirs = outcomes[reference.label].measurement
    assert theirs is not None
    common = {"noise_floor": theirs.floor, "noises": plan.open_loop.noises}
    if row is reference:
        missing = dict.fromkeys(("action_error_ci95", "action_errors", "error_vs_default"))
        return {"action_error": 0.0, **missing, **common}
    shares = _shares(row, plan, outcomes)
    return {
        "action_error": float(shares.sum()),
        "action_error_ci95": list(bootstrap_total(shares)),
        "action_errors": [float(f"{share:.4g}") for share in shares],
        "error_vs_default": _versus_default(row, shares, plan, outcomes),
        **common,
    }


def _shares(row: SweepRow, plan: Plan, outcomes: Mapping[str, Outcome]) -> Array:
    ours = outcomes[row.label].measurement
    theirs = outcomes[plan.references[row.label].label].measurement
    assert ours is not None and theirs is not None
    return error_shares(ours.chunks, theirs.chunks)


def _versus_default(
    row: SweepRow, shares: Array, plan: Plan, outcomes: Mapping[str, Outcome]
) -> dict[str, Any] | None:
    """The error over that of the default recipe on the same observations."""
    for other in plan.rows:
        same = (other.policy, other.condition) == (row.policy, row.condition)
        if same and other.recipe == DEFAULT_RECIPE and other is not row:
            return error_ratios(shares, _shares(other, plan, outcomes))
    return None


def error_ratios(shares: Array, theirs: Array) -> dict[str, Any]:
    """What two rows' shares of one error say of each other; keys as in docs/json.md."""
    ratio, interval = bootstrap_ratio(shares, theirs)
    typical = bootstrap_median_ratio(shares, theirs)
    return {
        "ratio": ratio,
        "ci95": list(interval),
        "typical_ratio": None if typical is None else typical[0],
        "typical_ci95": None if typical is None else list(typical[1]),
    }


def _file_name(label: str) -> str:
    return "".join(char if char.isalnum() or char in "-." else "_" for char in label)


def _assemble(
    row: SweepRow, outcome: Outcome, reference: Outcome, closed_loop: ClosedLoop | None
) -> dict[str, Any]:
    episodes = outcome.episodes
    successes = sum(record.success for record in episodes)
    return {
        "policy": row.policy,
        "recipe": row.recipe,
        "condition": row.condition,
        "realizable": row.realizable,
        "success": _per_task(episodes),
        "success_mean": successes / len(episodes) if episodes else None,
        "success_ci95": list(wilson_interval(successes, len(episodes))) if episodes else None,
        "smoothness": relative_smoothness(
            [record.jerk for record in episodes], [record.jerk for record in reference.episodes]
        ),
        "drift": _drift(outcome, reference, closed_loop),
        "checkpoint_bytes": outcome.footprint.checkpoint_bytes,
        "resident_bytes": outcome.footprint.resident_bytes,
        "ms_per_chunk": (
            statistics.median(record.ms_per_chunk for record in episodes) if episodes else None
        ),
        "seeds": [] if closed_loop is None else list(dict.fromkeys(closed_loop.seeds)),
        "episodes": len(episodes),
        "smoke": any(n < SMOKE_BELOW for _, n in _per_task(episodes).values()) or not episodes,
        "paired_vs_reference": None if outcome is reference else _paired(outcome, reference),
        **row.extra,
        **row.derived,
    }


def _drift(
    outcome: Outcome, reference: Outcome, closed_loop: ClosedLoop | None
) -> dict[str, Any] | None:
    if outcome is reference or closed_loop is None:
        return None
    return hand_drift(outcome.episodes, reference.episodes, closed_loop.execute)


def _per_task(episodes: Sequence[EpisodeRecord]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for record in episodes:
        count = counts.setdefault(record.task, [0, 0])
        count[0] += record.success
        count[1] += 1
    return counts


def _paired(outcome: Outcome, reference: Outcome) -> dict[str, Any] | None:
    if not outcome.episodes:
        return None
    compared = compare_paired(
        [record.success for record in outcome.episodes],
        [record.success for record in reference.episodes],
    )
    return {
        "episodes": compared.episodes,
        "only_row": compared.only_method,
        "only_reference": compared.only_reference,
        "difference": compared.difference,
        "ci95": list(compared.ci95),
        "mcnemar_p": compared.mcnemar_p,
    }
