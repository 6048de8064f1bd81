"""The benchmark on one page: methods down, conditions across, success and action error in a cell.

A cell reads ``96.0 % · 0.0123``: success over all tasks and seeds, and the action error.  The
lowest error of a condition among methods that exist as integers and store about four bits for every
weight is marked; so is every one that is not significantly different from the default
recipe.  Methods that keep more bits stand in the table with their bits, and out of that contest.
"""

from __future__ import annotations

from collections.abc import Sequence

from omega_qvla.report.table import (
    MISSING,
    Table,
    error_text,
    human_bytes,
    simulated_mark,
)
from omega_qvla.results.rows import HandDrift, Row

LOWEST, LEVEL = " ◂", " ="
_NOTES = (
    "cells: success over all tasks and seeds · action error; ◂ lowest error of the methods that "
    "exist as integers of about four bits; = not significantly different from the default recipe "
    "(paired bootstrap, 95 %)",
    "*: simulated, its integers cannot be multiplied as stored",
    "stress: the same function with planted outliers, not a real checkpoint; full precision is the "
    "same function in every column and was run once",
)


def benchmark_tables(results: Sequence[Row]) -> dict[str, Table]:
    """One table per policy."""
    policies = dict.fromkeys(result.policy for result in results)
    return {name: _table([r for r in results if r.policy == name]) for name in policies}


def unseen_table(results: Sequence[Row]) -> Table:
    """What calibration did not see: methods down, conditions across, one policy."""
    conditions = list(dict.fromkeys(result.condition for result in results))
    cells = {(result.recipe, result.condition): result for result in results}
    lowest = {condition: _lowest(results, condition) for condition in conditions}
    rows: list[tuple[str, ...]] = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        found = [cells[recipe, condition] for condition in conditions]
        ratio = next((result.unseen_over_seen for result in found if result.unseen_over_seen), None)
        rows.append(
            (
                recipe + simulated_mark(found[0]),
                *(error_text(result.action_error) + _marks(result, lowest) for result in found),
                MISSING if ratio is None else f"{ratio.ratio:.2f} {_interval(ratio.ci95)}",
            )
        )
    notes = (
        "action errors; unseen over seen: with the interval of a bootstrap paired over "
        "observations (95 %); marks and * as in the benchmark",
    )
    return Table(("recipe", *conditions, "unseen over seen"), tuple(rows), notes)


def error_table(results: Sequence[Row]) -> Table:
    """Action errors with their intervals, alone and against the default recipe."""
    header = (
        "recipe",
        "condition",
        "action error",
        "95 %",
        "over default's",
        "95 %",
        "typical",
        "over default's",
        "95 %",
    )
    notes = (
        "intervals: bootstrap over observations, those of ratios paired; typical: if all "
        "observations were as the median one",
    )
    rows = [
        (
            result.recipe + simulated_mark(result),
            result.condition,
            error_text(result.action_error),
            _interval(result.action_error_ci95),
            _ratio(versus and versus.ratio),
            _interval(versus and versus.ci95),
            error_text(result.typical_error),
            _ratio(versus and versus.typical_ratio),
            _interval(versus and versus.typical_ci95),
        )
        for result in results
        if not result.is_full_precision
        for versus in [result.error_vs_default]
    ]
    return Table(header, tuple(rows), notes)


def drift_table(results: Sequence[Row]) -> Table:
    """How far the hand is from where full precision has it, after so many control steps."""
    steps = list(dict.fromkeys(step for result in results for step in result.drift or ()))
    header = ("recipe", "condition", *(f"after {step} steps" for step in steps))
    notes = ("median (90 %) in centimetres, over the episodes that both were still running then",)
    rows = [
        (
            result.recipe + simulated_mark(result),
            result.condition,
            *(_drift(result.drift.get(step)) for step in steps),
        )
        for result in results
        if result.drift
    ]
    return Table(header, tuple(rows), notes)


def _interval(interval: tuple[float, float] | None) -> str:
    return MISSING if interval is None else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


def _ratio(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}"


def _drift(entry: HandDrift | None) -> str:
    if entry is None:
        return MISSING
    median, high = 100 * entry.median_m, 100 * entry.p90_m
    return f"{median:.1f} ({high:.1f}), {entry.episodes} episodes"


def _table(results: Sequence[Row]) -> Table:
    conditions = list(dict.fromkeys(result.condition for result in results))
    cells = {(result.recipe, result.condition): result for result in results}
    lowest = {condition: _lowest(results, condition) for condition in conditions}
    rows: list[tuple[str, ...]] = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        first = next(result for result in results if result.recipe == recipe)
        found = [cells.get((recipe, condition)) for condition in conditions]
        rows.append(
            (
                recipe + simulated_mark(first),
                MISSING if first.bits_per_weight is None else f"{first.bits_per_weight:.2f}",
                human_bytes(first.checkpoint_bytes),
                *(_cell(result, lowest) for result in found),
            )
        )
    return Table(("recipe", "bits/weight", "checkpoint", *conditions), tuple(rows), _NOTES)


def _lowest(results: Sequence[Row], condition: str) -> Row | None:
    contest = [r for r in results if r.condition == condition and in_contest(r)]
    return min(contest, key=lambda r: r.action_error or 0.0, default=None)


def in_contest(result: Row) -> bool:
    """Whether a row counts when the lowest error of about four bits is looked for."""
    return (
        result.realizable
        and not result.is_full_precision
        and result.action_error is not None
        and result.is_four_bits
    )


def _cell(result: Row | None, lowest: dict[str, Row | None]) -> str:
    if result is None:
        return MISSING
    success = MISSING if result.success_mean is None else f"{100 * result.success_mean:.1f} %"
    return f"{success} · {error_text(result.action_error)}{_marks(result, lowest)}"


def _marks(result: Row, lowest: dict[str, Row | None]) -> str:
    """Of the lowest error of a condition, and of errors not significantly different from the
    default's.
    """
    mark = LOWEST if result is lowest[result.condition] else ""
    versus = result.error_vs_default
    if versus is not None and versus.ci95[0] <= 1 <= versus.ci95[1] and in_contest(result):
        mark += LEVEL
    return mark
