"""What a sweep is asked for: its rows, what each is compared with, and what is run of them.

A row is labels plus a function that builds its policy.  Every row is compared with the
full-precision row (recipe ``fp32`` or ``bf16``) of the same policy and condition, or with the plain
one if that condition has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla.errors import RecipeError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Footprint
from omega_qvla.evaluation.openloop import NOISES, Measurement, Sampler
from omega_qvla.evaluation.rollout import Transform
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.rows import FULL_PRECISION

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Storage:
    """What a recipe stores of a policy's linears, as a row says it."""

    bits_per_weight: float
    weights_16bit: int
    left_in_16_bits: Sequence[str]


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
        scope, recipe_hash: they identify the row, so an interrupted sweep continues only where they
            are the same.
        storage: what the recipe stores per weight.
        blueprint: how another process builds the policy; None: only this one can.
        alone: it is its own reference, having nothing to be compared with.
    """

    policy: str
    recipe: str
    build: Callable[[], Sampler]
    condition: str = "plain"
    realizable: bool = True
    footprint: Callable[[Sampler], Footprint] | None = None
    scope: str | None = None
    recipe_hash: str | None = None
    storage: Storage | None = None
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

    @classmethod
    def of(
        cls,
        rows: Sequence[SweepRow],
        closed_loop: ClosedLoop | None,
        open_loop: OpenLoop | None,
    ) -> Plan:
        """Every row with the full-precision row it is compared with.

        Raises:
            RecipeError: no rows, two rows with one label, or a row without a reference.
        """
        _check(rows)
        references = {row.label: _reference_of(row, rows) for row in rows}
        return cls(rows, references, closed_loop, open_loop)

    def episodes(self) -> list[tuple[str, int]]:
        """(task, seed) of every row, in order."""
        if self.closed_loop is None:
            return []
        seeds = list(dict.fromkeys(self.closed_loop.seeds))
        return [(task, seed) for task in dict.fromkeys(self.closed_loop.tasks) for seed in seeds]


Evaluate = Callable[[Plan, Progress], Mapping[str, Outcome]]
"""Evaluates every row of a plan; outcomes by label."""


def journal_of(row: SweepRow, closed_loop: ClosedLoop) -> tuple[Path | None, dict[str, Any]]:
    """The journal of a row's episodes, and the identity that its first line must agree with."""
    labels = {"policy": row.policy, "recipe": row.recipe, "condition": row.condition}
    labels |= {} if row.scope is None else {"scope": row.scope}
    labels |= {} if row.recipe_hash is None else {"recipe_hash": row.recipe_hash}
    folder = closed_loop.journals
    path = None if folder is None else folder / f"{_file_name(row.label)}.jsonl"
    return path, {**labels, **closed_loop.identity}


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


def _file_name(label: str) -> str:
    return "".join(char if char.isalnum() or char in "-." else "_" for char in label)
