"""Several recipes on the same episodes and observations, as one JSON document.

A sweep takes a list of :class:`~omega_qvla.evaluation.execution.plan.SweepRow`: labels and how the
policy is built.  Of a full-precision row only its chunks and outcomes are kept.  Every row is
compared with the full-precision row (recipe ``fp32`` or ``bf16``) of the same policy and condition,
or with the plain one if that condition has none: action error, noise floor, smoothness, and success
on the same seeds.

A sweep has three parts: which row is compared with which, the evaluation of the rows
(``execution/``), and the document.  The second may be done by this process, by several or by a
cluster, and gives the same document.

Without a simulator the open-loop half still runs: pass ``pool=None`` and the closed-loop values are
empty or null.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omega_qvla.errors import RecipeError, ResourceError
from omega_qvla.evaluation.drift import hand_drift
from omega_qvla.evaluation.execution.evaluate import Progress, evaluate
from omega_qvla.evaluation.execution.executor import Executor
from omega_qvla.evaluation.execution.inline import InlineExecutor
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, Outcome, Plan, SweepRow
from omega_qvla.evaluation.openloop import Array, error_shares
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.statistics import (
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_total,
    compare_paired,
    relative_smoothness,
    wilson_interval,
)

SCHEMA = 1
SMOKE_BELOW = 100
"""With fewer episodes than this on any task a row is marked as a smoke test."""


def run_sweep(
    rows: Sequence[SweepRow],
    *,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Evaluate every row.

    Args:
        progress: called with (row label, finished episodes, all episodes of the row).
        executor: who evaluates the rows; None is this process.

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
    outcomes = evaluate(plan, executor or InlineExecutor(), progress or _silent)
    return {
        "schema": SCHEMA,
        "policy": ", ".join(dict.fromkeys(row.policy for row in rows)),
        "rows": [
            _assemble(row, outcomes[row.label], outcomes[references[row.label].label], closed_loop)
            | _open_loop_part(row, plan, outcomes)
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
