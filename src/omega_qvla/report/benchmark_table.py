"""The benchmark on one page: methods down, conditions across, success and action error in a cell.

A cell reads ``96.0 % · 0.0123``: success over all tasks and seeds, and the action error.  The
lowest error of a condition among methods that exist as integers and store about four bits for every
weight is marked; so is every one that the paired bootstrap does not tell apart from the default
recipe.  Methods that keep more bits stand in the table with their bits, and out of that contest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from omega_qvla.report.table import MISSING, Table, error_text, human_bytes, simulated_mark
from omega_qvla.results.rows import Result, load_results

LOWEST, LEVEL = " ◂", " ="
_NOTES = (
    "cells: success over all tasks and seeds · action error; ◂ lowest error of the methods that "
    "exist as integers of about four bits; = not told apart from the default recipe by the paired "
    "bootstrap (95 %)",
    "*: simulated, its integers cannot be multiplied as stored",
    "stress: the same function with planted outliers, not a real checkpoint; full precision is the "
    "same function in every column and was run once",
)


def benchmark_tables(path: str | Path) -> dict[str, Table]:
    """One table per policy of a saved comparison.

    Raises:
        ReportError: the file cannot be read as a comparison.
    """
    results = load_results(path)
    policies = dict.fromkeys(result.policy for result in results)
    return {name: _table([r for r in results if r.policy == name]) for name in policies}


def unseen_table(path: str | Path) -> Table:
    """What calibration did not see: methods down, conditions across, one policy.

    Raises:
        ReportError: the file cannot be read as a comparison.
    """
    results = load_results(path)
    conditions = list(dict.fromkeys(result.condition for result in results))
    cells = {(result.recipe, result.condition): result for result in results}
    lowest = {condition: _lowest(results, condition) for condition in conditions}
    rows: list[tuple[str, ...]] = []
    for recipe in dict.fromkeys(result.recipe for result in results):
        found = [cells[recipe, condition] for condition in conditions]
        ratio = next((result for result in found if result.unseen_ratio is not None), None)
        rows.append(
            (
                recipe + simulated_mark(found[0]),
                *(error_text(result.action_error) + _marks(result, lowest) for result in found),
                MISSING
                if ratio is None
                else f"{ratio.unseen_ratio:.2f} {_interval(ratio.unseen_ci95)}",
            )
        )
    notes = (
        "action errors; unseen over seen: with the interval of a bootstrap paired over "
        "observations (95 %); marks and * as in the benchmark",
    )
    return Table(("recipe", *conditions, "unseen over seen"), tuple(rows), notes)


def error_table(results: Sequence[Result]) -> Table:
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
            _interval(result.error_ci95),
            MISSING if result.error_ratio is None else f"{result.error_ratio:.2f}",
            _interval(result.error_vs_default),
            MISSING if result.typical_error is None else error_text(result.typical_error),
            MISSING if result.typical_ratio is None else f"{result.typical_ratio:.2f}",
            _interval(result.typical_vs_default),
        )
        for result in results
        if not result.is_full_precision
    ]
    return Table(header, tuple(rows), notes)


def drift_table(results: Sequence[Result]) -> Table:
    """How far the hand is from where full precision has it, after so many control steps."""
    steps = list(dict.fromkeys(step for result in results for step in result.drift))
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


def _drift(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return MISSING
    median, high = 100 * entry["median_m"], 100 * entry["p90_m"]
    return f"{median:.1f} ({high:.1f}), {entry['episodes']:.0f} episodes"


def _table(results: Sequence[Result]) -> Table:
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


def _lowest(results: Sequence[Result], condition: str) -> Result | None:
    contest = [r for r in results if r.condition == condition and in_contest(r)]
    return min(contest, key=lambda r: r.action_error or 0.0, default=None)


def in_contest(result: Result) -> bool:
    """Whether a row counts when the lowest error of about four bits is looked for."""
    return (
        result.realizable
        and not result.is_full_precision
        and result.action_error is not None
        and result.is_four_bits
    )


def _cell(result: Result | None, lowest: dict[str, Result | None]) -> str:
    if result is None:
        return MISSING
    success = MISSING if result.success_mean is None else f"{100 * result.success_mean:.1f} %"
    return f"{success} · {error_text(result.action_error)}{_marks(result, lowest)}"


def _marks(result: Result, lowest: dict[str, Result | None]) -> str:
    """Of the lowest error of a condition, and of those not told apart from the default's."""
    mark = LOWEST if result is lowest[result.condition] else ""
    interval = result.error_vs_default
    if interval is not None and interval[0] <= 1 <= interval[1] and in_contest(result):
        mark += LEVEL
    return mark
