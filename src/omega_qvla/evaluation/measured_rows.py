"""What an evaluated row says: success, action error, smoothness and drift against its reference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omega_qvla.evaluation.drift import hand_drift
from omega_qvla.evaluation.execution.plan import ClosedLoop, Outcome, Plan, SweepRow
from omega_qvla.evaluation.openloop import Array, error_shares
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.results.document import Interval
from omega_qvla.results.episodes import EpisodeRecord, per_task
from omega_qvla.results.rows import ErrorRatio, HandDrift, PairedSuccess, Row, is_smoke
from omega_qvla.results.statistics import (
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_total,
    compare_paired,
    relative_smoothness,
    wilson_interval,
)


@dataclass(frozen=True)
class ActionError:
    """The open-loop half of a row; attributes are named as in a row."""

    action_error: float | None = None
    action_error_ci95: Interval | None = None
    action_errors: list[float] | None = None
    error_vs_default: ErrorRatio | None = None

    @classmethod
    def of(cls, shares: Array, of_default: Array | None) -> ActionError:
        """The error that observations add up to, [n], against that of the default recipe, [n]."""
        return cls(
            action_error=float(shares.sum()),
            action_error_ci95=bootstrap_total(shares),
            action_errors=[float(f"{share:.4g}") for share in shares],
            error_vs_default=None if of_default is None else error_ratio(shares, of_default),
        )


def measured_row(row: SweepRow, plan: Plan, outcomes: Mapping[str, Outcome]) -> Row:
    """A row from what its evaluation and that of its reference came to.

    Args:
        outcomes: of every row of the plan, by label.
    """
    outcome, reference = outcomes[row.label], outcomes[plan.references[row.label].label]
    episodes, closed_loop, storage = outcome.episodes, plan.closed_loop, row.storage
    success = per_task(episodes)
    solved = sum(record.success for record in episodes)
    error = _action_error(row, plan, outcomes)
    floor = None if reference.measurement is None else reference.measurement.floor
    return Row(
        policy=row.policy,
        recipe=row.recipe,
        condition=row.condition,
        realizable=row.realizable,
        success=success,
        success_mean=solved / len(episodes) if episodes else None,
        success_ci95=wilson_interval(solved, len(episodes)) if episodes else None,
        action_error=error.action_error,
        noise_floor=floor,
        action_error_ci95=error.action_error_ci95,
        action_errors=error.action_errors,
        error_vs_default=error.error_vs_default,
        noises=None if plan.open_loop is None else plan.open_loop.noises,
        smoothness=None if row.alone else _smoothness(episodes, reference.episodes),
        drift=None if outcome is reference else _drift(outcome, reference, closed_loop),
        checkpoint_bytes=outcome.footprint.checkpoint_bytes,
        resident_bytes=outcome.footprint.resident_bytes,
        ms_per_chunk=(
            statistics.median(record.ms_per_chunk for record in episodes) if episodes else None
        ),
        seeds=[] if closed_loop is None else list(dict.fromkeys(closed_loop.seeds)),
        episodes=len(episodes),
        smoke=is_smoke(success),
        paired_vs_reference=None if outcome is reference else _paired(outcome, reference),
        scope=row.scope,
        recipe_hash=row.recipe_hash,
        bits_per_weight=None if storage is None else storage.bits_per_weight,
        weights_16bit=None if storage is None else storage.weights_16bit,
        left_in_16_bits=None if storage is None else list(storage.left_in_16_bits),
    )


def error_ratio(shares: Array, theirs: Array) -> ErrorRatio:
    """One error over another, from what the same observations add to each, [n]."""
    ratio, interval = bootstrap_ratio(shares, theirs)
    typical = bootstrap_median_ratio(shares, theirs)
    return ErrorRatio(
        ratio=ratio,
        ci95=interval,
        typical_ratio=None if typical is None else typical[0],
        typical_ci95=None if typical is None else typical[1],
    )


def _action_error(row: SweepRow, plan: Plan, outcomes: Mapping[str, Outcome]) -> ActionError:
    if plan.open_loop is None:
        return ActionError()
    if plan.references[row.label] is row:
        return ActionError(action_error=0.0)
    of_default = None
    for other in plan.rows:
        same = (other.policy, other.condition) == (row.policy, row.condition)
        if same and other.recipe == DEFAULT_RECIPE and other is not row:
            of_default = _shares(other, plan, outcomes)
    return ActionError.of(_shares(row, plan, outcomes), of_default)


def _shares(row: SweepRow, plan: Plan, outcomes: Mapping[str, Outcome]) -> Array:
    ours = outcomes[row.label].measurement
    theirs = outcomes[plan.references[row.label].label].measurement
    assert ours is not None and theirs is not None
    return error_shares(ours.chunks, theirs.chunks)


def _smoothness(episodes: Sequence[EpisodeRecord], theirs: Sequence[EpisodeRecord]) -> float | None:
    return relative_smoothness([one.jerk for one in episodes], [one.jerk for one in theirs])


def _drift(
    outcome: Outcome, reference: Outcome, closed_loop: ClosedLoop | None
) -> dict[str, HandDrift] | None:
    if closed_loop is None:
        return None
    return hand_drift(outcome.episodes, reference.episodes, closed_loop.execute)


def _paired(outcome: Outcome, reference: Outcome) -> PairedSuccess | None:
    if not outcome.episodes:
        return None
    return compare_paired(
        [record.success for record in outcome.episodes],
        [record.success for record in reference.episodes],
    )
