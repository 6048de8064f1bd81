"""Comparisons and evaluations: one row per recipe and condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from omega_qvla.results.document import (
    Count,
    Document,
    Interval,
    Measured,
    MeasuredInterval,
    Number,
    Part,
)

FULL_PRECISION = ("fp32", "bf16")
"""Recipes that are the reference of the others."""
FOUR_BITS = 5.0
"""Bits per weight, scales included, up to which a method counts as four bits."""
SMOKE_BELOW = 100
"""With fewer episodes than this on any task a row is a smoke test."""


def _possible(counts: tuple[int, int]) -> tuple[int, int]:
    successes, episodes = counts
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes")
    return counts


Successes = Annotated[tuple[int, int], AfterValidator(_possible)]
"""Successes and episodes."""


class ErrorRatio(Part):
    """An action error over another one, measured on the same observations.

    Attributes:
        ratio: of the two errors.
        ci95: bootstrap over the observations, in pairs.
        typical_ratio: the same of the median observation; null where that of the other is zero.
        typical_ci95: its interval.
    """

    ratio: Measured
    ci95: MeasuredInterval
    typical_ratio: Measured | None
    typical_ci95: MeasuredInterval | None


class PairedSuccess(Part):
    """The same episodes, by a recipe and by full precision.

    Attributes:
        episodes: how many pairs.
        only_row, only_reference: solved by this one, or by full precision, alone.
        difference: of the two success rates.
        ci95: interval of the difference.
        mcnemar_p: McNemar's exact p-value.
    """

    episodes: Count
    only_row: Count
    only_reference: Count
    difference: Number
    ci95: Interval
    mcnemar_p: Measured


class HandDrift(Part):
    """How far the hand is from where full precision has it by then.

    Attributes:
        median_m, p90_m: metres.
        episodes: those that both were still running.
    """

    median_m: Measured
    p90_m: Measured
    episodes: Count


class Row(Part):
    """One recipe under one condition.

    Attributes:
        policy: what was loaded.
        recipe: recipe name; `fp32` and `bf16` are full precision.
        condition: `plain`, or `stress:30` for the [outlier-injected
            policy](outlier-injection.md) of that magnitude; of `unseen` what the recipe was
            calibrated on.
        realizable: false: a simulation, whose integers cannot be multiplied as stored.
        success: closed loop, per task successes and episodes; the same seeds in every row.
        success_mean: successes over episodes, all tasks together.
        success_ci95: Wilson 95 % interval of `success_mean`.
        action_error: mean squared difference of the action chunk from full precision on held-out
            observations with the same noise, over the mean square of the full-precision chunk; in
            the network's normalized units where the policy offers them.
        noise_floor: the same figure for two full-precision chunks with different noise.
        action_error_ci95: bootstrap over the observations.
        action_errors: what each held-out observation adds to `action_error`; they sum to it.
        error_vs_default: the error over that of the recipe that was the default then
            (`omega-w4a4-no-prior` in `benchmark-v1.json`, `omega-w4a4` now) in the same condition;
            null without that row and in it.
        noises: noises per held-out observation behind both.
        smoothness: mean squared jerk of the executed actions, over that of full precision.
        drift: by control steps (`"25"`, `"50"`, `"100"`); null in the reference row.
        checkpoint_bytes: the whole checkpoint on disk.
        resident_bytes: its tensors in memory.
        ms_per_chunk: median time of a pass of the policy, divided by the episodes that shared it.
        seeds: the episodes' seeds.
        episodes: closed-loop episodes, all tasks together.
        smoke: some task has fewer than 100 episodes: a smoke test, not a measurement.
        paired_vs_reference: the same episodes against full precision; null in the reference row.
        scope: `all` or `paper`.
        recipe_hash: content hash of the recipe as it was run; absent in full-precision rows, as the
            next three.
        bits_per_weight: bits stored for the weights of all linears over their number: integers,
            scales, low-rank branches, 16 for those not quantized; transforms are not weights.
        weights_16bit: how many weights of those linears stay in 16 bits.
        left_in_16_bits: what the recipe leaves in 16 bits, or adds in 16 bits, in words.
        unseen_over_seen: of `unseen`, in rows of unseen tasks: the error over that on seen tasks.
        benchmark: of `eval --env libero`: `libero`; its tasks are named `suite:number`, its seeds
            are the numbers of the recorded initial states.
        protocol: of `eval --env libero`: `paper` or `full`.
        suites: of `eval --env libero`: per suite successes and episodes.
        environment: of `eval --env MODULE:CALLABLE`: that environment.
        execute: of `eval --env MODULE:CALLABLE`: actions carried out of each chunk.
        source: the file it was read from; not written.
        unfinished: it is summed up from a journal; not written.
    """

    policy: str
    recipe: str
    condition: str
    realizable: bool
    success: dict[str, Successes]
    success_mean: Measured | None
    success_ci95: MeasuredInterval | None
    action_error: Measured | None
    noise_floor: Measured | None
    action_error_ci95: MeasuredInterval | None
    action_errors: list[Measured] | None
    error_vs_default: ErrorRatio | None
    noises: Count | None
    smoothness: Measured | None
    drift: dict[str, HandDrift] | None
    checkpoint_bytes: Count | None
    resident_bytes: Count | None
    ms_per_chunk: Measured | None
    seeds: list[int]
    episodes: Count
    smoke: bool
    paired_vs_reference: PairedSuccess | None
    scope: str | None = None
    recipe_hash: str | None = None
    bits_per_weight: Measured | None = None
    weights_16bit: Count | None = None
    left_in_16_bits: list[str] | None = None
    unseen_over_seen: ErrorRatio | None = None
    benchmark: str | None = None
    protocol: str | None = None
    suites: dict[str, Successes] | None = None
    environment: str | None = None
    execute: Count | None = None
    source: str = Field(default="", exclude=True)
    unfinished: bool = Field(default=False, exclude=True)

    @model_validator(mode="after")
    def _counts_agree(self) -> Row:
        counted = sum(episodes for _, episodes in self.success.values())
        if self.episodes != counted:
            raise ValueError(f"{self.episodes} episodes, but {counted} over all tasks")
        return self

    @property
    def cell(self) -> tuple[str, str, str, str]:
        """What two rows must share to be about the same thing: policy, recipe, condition, scope."""
        return self.policy, self.recipe, self.condition, self.scope or "all"

    @property
    def solved(self) -> int:
        """Successes over all tasks."""
        return sum(successes for successes, _ in self.success.values())

    @property
    def typical_error(self) -> float | None:
        """The action error if all observations were as the median one."""
        shares = self.action_errors
        return len(shares) * median(shares) if shares else None

    @property
    def is_four_bits(self) -> bool:
        """Whether about four bits are stored for every weight."""
        return self.bits_per_weight is not None and self.bits_per_weight <= FOUR_BITS

    @property
    def is_full_precision(self) -> bool:
        """Whether this row is the reference of the others."""
        return self.recipe in FULL_PRECISION


class BenchmarkRun(Part):
    """What a run of the frozen benchmark says of itself.

    Attributes:
        version: of the benchmark.
        definition: SHA-256 of everything that the version fixes.
        machine: the processor.
        library: what measured, with its version.
        command: what to type for the same rows.
        missing: what the benchmark has and the rows do not.
    """

    version: str
    definition: str
    machine: str
    library: str
    command: str
    missing: list[str]


class UnseenRun(Part):
    """What `unseen` says of itself.

    Attributes:
        definition: `version`, and how many `observations`, `heldout` observations and `noises`.
        weights: SHA-256 of the policy's weights.
        calibration, heldout: SHA-256 of the observations.
        library: what measured, with its version.
        machine: the processor.
        command: what to type for the same rows.
    """

    definition: dict[str, str | int]
    weights: str
    calibration: str
    heldout: str
    library: str
    machine: str
    command: str


class Comparison(Document):
    """Rows of one policy, or of several.

    Attributes:
        policy: what was compared.
        rows: one per recipe and condition.
        benchmark: of `benchmark`.
        unseen: of `unseen`.
    """

    policy: str
    rows: list[Row]
    benchmark: BenchmarkRun | None = None
    unseen: UnseenRun | None = None


class Evaluation(Document):
    """One policy in the simulator.

    Attributes:
        row: what was measured.
    """

    row: Row


class MadeBy(Document):
    """What writes to the folder of a comparison; there before anything else is.

    Attributes:
        command: `demo`, `compare` or `benchmark`.
        begun: time in UTC.
        library: version.
    """

    command: str
    begun: str
    library: str


def is_smoke(success: Mapping[str, Sequence[int]]) -> bool:
    """Whether some task has too few episodes for a claim, or there are none."""
    return not success or any(episodes < SMOKE_BELOW for _, episodes in success.values())
