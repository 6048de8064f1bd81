"""Several recipes on the same episodes and observations, as one JSON document.

A sweep takes a list of :class:`SweepRow`: labels plus a function that builds the policy.  Rows run
one after the other, so only one policy needs to be in memory; of a full-precision row only its
chunks and outcomes are kept.  Every row is compared with the full-precision row (recipe ``fp32`` or
``bf16``) of the same policy and condition, or with the plain one if that condition has none:
action error, noise floor, smoothness, and success on the same seeds.

Without a simulator the open-loop half still runs: pass ``pool=None`` and the closed-loop values are
empty or null.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla.errors import PolicyError, RecipeError, ResourceError
from omega_qvla.evaluation.episodes import EpisodeRecord
from omega_qvla.evaluation.openloop import (
    Array,
    Sampler,
    draw_noises,
    offers_normalized,
    relative_error,
    sample_chunks,
)
from omega_qvla.evaluation.rollout import Transform, rollout
from omega_qvla.evaluation.simulators import SimulatorPool
from omega_qvla.evaluation.statistics import compare_paired, relative_smoothness, wilson_interval

SCHEMA = 1
FULL_PRECISION = ("fp32", "bf16")
SMOKE_BELOW = 100
"""With fewer episodes than this on any task a row is marked as a smoke test."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Footprint:
    """Bytes of the whole policy, quantized layers and everything else."""

    checkpoint_bytes: int | None = None
    resident_bytes: int | None = None


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
    """

    policy: str
    recipe: str
    build: Callable[[], Sampler]
    condition: str = "plain"
    realizable: bool = True
    footprint: Callable[[Sampler], Footprint] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])
    derived: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def label(self) -> str:
        """For progress lines and messages."""
        return f"{self.policy}, {self.recipe}, {self.condition}"

    @property
    def is_reference(self) -> bool:
        """Whether this is a full-precision row."""
        return self.recipe in FULL_PRECISION


@dataclass(frozen=True)
class ClosedLoop:
    """What the simulated half runs: every task with every seed."""

    pool: SimulatorPool
    tasks: Sequence[str]
    seeds: Sequence[int]
    execute: int = 5
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


@dataclass(frozen=True)
class _Outcome:
    """What later rows may be compared with."""

    episodes: list[EpisodeRecord]
    chunks: Array | None
    normalized: bool
    footprint: Footprint
    floor: float | None = None
    error: float | None = None


def run_sweep(
    rows: Sequence[SweepRow],
    *,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate every row.

    Args:
        progress: called with (row label, finished episodes, all episodes of the row).

    Returns:
        The document of DESIGN's ``compare``: ``{"schema": 1, "policy": ..., "rows": [...]}``, rows
        in the order given.  Beside the contract's keys a row has ``smoke``, ``episodes`` and
        ``paired_vs_reference`` (``{"episodes", "only_row", "only_reference", "difference",
        "ci95", "mcnemar_p"}``; null for references and without a simulator).  ``success_mean``
        is the rate over all episodes, with Wilson's interval.

    Raises:
        RecipeError: no rows, two rows with one label, or a row without a reference.
    """
    _check(rows)
    references = {row.label: _reference_of(row, rows) for row in rows}
    outcomes: dict[str, _Outcome] = {}
    for row in sorted(rows, key=lambda row: not row.is_reference):
        reference = references[row.label]
        known = None if reference is row else outcomes[reference.label]
        outcomes[row.label] = _evaluate(row, known, closed_loop, open_loop, progress)
    return {
        "schema": SCHEMA,
        "policy": ", ".join(dict.fromkeys(row.policy for row in rows)),
        "rows": [
            _assemble(row, outcomes[row.label], outcomes[references[row.label].label], closed_loop)
            for row in rows
        ],
    }


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    """Write JSON atomically: the file is either the old one or the complete new one.

    Raises:
        ResourceError: it cannot be written.
    """
    target = Path(path)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise ResourceError(f"cannot write {target}: {error}") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ResourceError(f"cannot write {target}: {error}") from error


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


def _evaluate(
    row: SweepRow,
    reference: _Outcome | None,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None,
) -> _Outcome:
    policy = row.build()
    footprint = Footprint() if row.footprint is None else row.footprint(policy)
    normalized = offers_normalized(policy)
    if reference is not None and reference.chunks is not None:
        if reference.normalized and not normalized:
            raise PolicyError(f"{row.label}: needs sample_normalized, which its reference has")
        normalized = reference.normalized
    chunks, floor, error = None, None, None
    if open_loop is not None:
        observations = open_loop.observations
        noises = draw_noises(policy, len(observations), open_loop.seed)
        chunks = sample_chunks(policy, observations, noises, normalized=normalized)
        if reference is None:
            others = draw_noises(policy, len(observations), open_loop.seed + 1)
            floor = relative_error(
                sample_chunks(policy, observations, others, normalized=normalized), chunks
            )
            error = 0.0
        elif reference.chunks is not None:
            floor, error = reference.floor, relative_error(chunks, reference.chunks)
    episodes = [] if closed_loop is None else _run_episodes(row, policy, closed_loop, progress)
    return _Outcome(episodes, chunks, normalized, footprint, floor, error)


def _run_episodes(
    row: SweepRow, policy: Sampler, closed_loop: ClosedLoop, progress: Progress | None
) -> list[EpisodeRecord]:
    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(row.label, done, total)

    labels = {"policy": row.policy, "recipe": row.recipe, "condition": row.condition}
    identity = {**labels, **row.extra, **closed_loop.identity}
    folder = closed_loop.journals
    return rollout(
        policy,
        closed_loop.tasks,
        closed_loop.seeds,
        pool=closed_loop.pool,
        execute=closed_loop.execute,
        transform=closed_loop.transform,
        journal=None if folder is None else folder / f"{_file_name(row.label)}.jsonl",
        identity=identity,
        progress=report,
    )


def _file_name(label: str) -> str:
    return "".join(char if char.isalnum() or char in "-." else "_" for char in label)


def _assemble(
    row: SweepRow, outcome: _Outcome, reference: _Outcome, closed_loop: ClosedLoop | None
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
        "action_error": outcome.error,
        "noise_floor": outcome.floor,
        "smoothness": relative_smoothness(
            [record.jerk for record in episodes], [record.jerk for record in reference.episodes]
        ),
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


def _per_task(episodes: Sequence[EpisodeRecord]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for record in episodes:
        count = counts.setdefault(record.task, [0, 0])
        count[0] += record.success
        count[1] += 1
    return counts


def _paired(outcome: _Outcome, reference: _Outcome) -> dict[str, Any] | None:
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
