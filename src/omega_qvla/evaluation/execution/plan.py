"""What is to be evaluated: rows, which is compared with which, episodes and observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint, Report
from omega_qvla.evaluation.openloop import NOISES, Measurement
from omega_qvla.evaluation.rollout import Group, seed_groups
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.rows import FULL_PRECISION


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
        build: builds the policy in this process; called when the row's turn comes, with a function
            that is told how far it is.
        condition: ``plain`` or ``stress:<magnitude>``.
        realizable: whether the recipe's integers can be multiplied as stored.
        scope, recipe_hash: they identify the row, so an interrupted sweep continues only where they
            are the same.
        storage: what the recipe stores per weight.
        blueprint: how another process builds the policy; None: only this one can.
        alone: it is its own reference, having nothing to be compared with.
    """

    policy: str
    recipe: str
    build: Callable[[Report], Built]
    condition: str = "plain"
    realizable: bool = True
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
    """Started when it is needed; other processes make one like it."""
    tasks: Sequence[str]
    seeds: Sequence[int]
    execute: int = 5
    together: int = 1
    """Episodes that share the policy's passes, see ``rollout.py``."""
    journals: Path | None = None
    """Folder of one journal per row, so that an interrupted sweep continues; None keeps none."""
    identity: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else fixes the outcome (weights' hash, stress seed), checked when resuming."""

    def groups(self) -> list[Group]:
        """The episodes of a row in order, those that advance together side by side."""
        groups = seed_groups(list(dict.fromkeys(self.seeds)), self.together)
        return [(task, group) for task in dict.fromkeys(self.tasks) for group in groups]


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

    def groups(self) -> list[Group]:
        """The episodes of every row, in order."""
        return [] if self.closed_loop is None else self.closed_loop.groups()
