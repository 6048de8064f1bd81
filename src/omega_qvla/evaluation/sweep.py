"""Several recipes on the same episodes and observations.

A sweep takes a list of :class:`~omega_qvla.evaluation.execution.plan.SweepRow`: labels and how the
policy is built.  Of a full-precision row only its chunks and outcomes are kept.  Every row is
compared with the full-precision row (recipe ``fp32`` or ``bf16``) of the same policy and condition,
or with the plain one if that condition has none: action error, noise floor, smoothness, and success
on the same seeds.

A sweep has three parts: which row is compared with which, the evaluation of the rows
(``execution/``), and the document
(``measured_rows.py``).  The second may be done by this process, by several or by a
cluster, and gives the same document.

Without a simulator the open-loop half still runs: pass ``closed_loop=None`` and the closed-loop
values are empty or null.
"""

from __future__ import annotations

from collections.abc import Sequence

from omega_qvla.errors import RecipeError
from omega_qvla.evaluation.execution.evaluate import Progress, evaluate
from omega_qvla.evaluation.execution.executor import Executor
from omega_qvla.evaluation.execution.inline import InlineExecutor
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, Plan, SweepRow
from omega_qvla.evaluation.measured_rows import measured_row
from omega_qvla.results.rows import Comparison


def run_sweep(
    rows: Sequence[SweepRow],
    *,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Comparison:
    """Evaluate every row.

    Args:
        progress: called with (row label, finished episodes, all episodes of the row).
        executor: who evaluates the rows; None is this process.

    Returns:
        One row per row given, in their order (docs/json.md says what is in it).

    Raises:
        RecipeError: no rows, two rows with one label, or a row without a reference.
    """
    _check(rows)
    references = {row.label: _reference_of(row, rows) for row in rows}
    plan = Plan(rows, references, closed_loop, open_loop)
    outcomes = evaluate(plan, executor or InlineExecutor(), progress or _silent)
    return Comparison(
        policy=", ".join(dict.fromkeys(row.policy for row in rows)),
        rows=[measured_row(row, plan, outcomes) for row in rows],
    )


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
