"""Several recipes on the same episodes and observations.

In one process rows run one after the other, so only one policy needs to be in memory; of a
full-precision row only its chunks and outcomes are kept.

A sweep has three parts: which row is compared with which (``plan.py``), where the rows are
evaluated, and the document (``measured_rows.py``).  Only the second differs between one process
(:func:`evaluate_here`), several processes and a cluster (``execution/``), so all of them give
the same document.

Without a simulator the open-loop half still runs: pass ``closed_loop=None`` and the closed-loop
values are empty or null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.execution.blueprint import Footprint
from omega_qvla.evaluation.measured_rows import measured_row
from omega_qvla.evaluation.openloop import Sampler, measure_reference, measure_row
from omega_qvla.evaluation.plan import (
    ClosedLoop,
    Evaluate,
    OpenLoop,
    Outcome,
    Plan,
    Progress,
    SweepRow,
    journal_of,
)
from omega_qvla.evaluation.rollout import rollout
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.rows import Comparison


def run_sweep(
    rows: Sequence[SweepRow],
    *,
    closed_loop: ClosedLoop | None,
    open_loop: OpenLoop | None,
    progress: Progress | None = None,
    evaluate: Evaluate | None = None,
) -> Comparison:
    """Evaluate every row.

    Args:
        progress: called with (row label, finished episodes, all episodes of the row).
        evaluate: where the rows are evaluated; None is :func:`evaluate_here`.

    Returns:
        One row per row given, in their order (docs/json.md says what is in it).

    Raises:
        RecipeError: no rows, two rows with one label, or a row without a reference.
    """
    plan = Plan.of(rows, closed_loop, open_loop)
    outcomes = (evaluate or evaluate_here)(plan, progress or _silent)
    return Comparison(
        policy=", ".join(dict.fromkeys(row.policy for row in rows)),
        rows=[measured_row(row, plan, outcomes) for row in rows],
    )


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
