"""Recipes side by side on one policy: what ``demo`` and ``compare`` run.

Every realizable recipe takes the way a user's policy takes: it is quantized, saved as packed
integers, and what is evaluated is what was loaded back from that directory alone.  Simulation-only
recipes are evaluated as simulations and have no checkpoint size.  The stress condition applies all
recipes to the same policy with outliers injected, whose full-precision function is checked to be
unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import Choices
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.execution.blueprint import Blueprint
from omega_qvla.evaluation.execution.building import (
    Load,
    full_blueprint,
    quantized_blueprint,
)
from omega_qvla.evaluation.execution.plan import Storage, SweepRow
from omega_qvla.evaluation.outlier_injection import condition_name, outlier_injected
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.recipe import Recipe, Scope
from omega_qvla.runtime.memory import weight_storage

REFERENCE = "fp32"


@dataclass(frozen=True)
class Compared:
    """What to compare.

    Attributes:
        label: the policy as the user named it.
        policy: full precision.
        choices: what its checkpoint leaves open, so that other processes can load it too.
        weights: fingerprint of its weights.
        checkpoint_bytes: size of its checkpoint.
        calibration: observations for calibration.
        recipes: names or files of recipes; ``methods`` and ``ablations`` are all of their kind.
        magnitudes: stress magnitudes; 0 is the policy as it is.
        scope: ``all`` is each recipe as written, ``paper`` backbone and action head only.
        artifacts: realizable recipes are saved here.
        seed: draws the outliers' channels and factors.
        reference: full precision in ``each`` condition, or ``once``, as it is: with outliers
            injected it computes the same function, which is checked when that is done.
        resume: take the artifacts that are there, if they were made from the same.
    """

    label: str
    policy: NativePolicy
    choices: Choices
    weights: str
    checkpoint_bytes: int | None
    calibration: Observations
    recipes: Sequence[str]
    magnitudes: Sequence[float]
    scope: Scope
    artifacts: Path
    seed: int = 0
    reference: Literal["each", "once"] = "each"
    resume: bool = False


def comparison_rows(comparison: Compared) -> list[SweepRow]:
    """Full precision and every recipe, under every condition.

    Raises:
        RecipeError: a recipe is unknown or invalid; nothing has been run then.
    """
    names = expand_recipes(comparison.recipes)
    recipes = [Recipe.load(name).scoped(comparison.scope) for name in names]
    return [
        row
        for magnitude in comparison.magnitudes
        for row in _condition_rows(comparison, recipes, magnitude)
    ]


def _condition_rows(
    comparison: Compared, recipes: Iterable[Recipe], magnitude: float
) -> list[SweepRow]:
    condition = condition_name(magnitude)
    probe = comparison.calibration[0]

    def full() -> NativePolicy:
        return outlier_injected(comparison.policy, magnitude, seed=comparison.seed, probe=probe)

    blueprint = full_blueprint(
        comparison.label,
        comparison.choices,
        comparison.weights,
        magnitude,
        seed=comparison.seed,
        probe=dict(probe),
        checkpoint_bytes=comparison.checkpoint_bytes,
    )
    reference = SweepRow(
        comparison.label,
        REFERENCE,
        partial(blueprint.build, loaded=full),
        condition,
        scope=comparison.scope,
        blueprint=blueprint,
    )
    rows = [_recipe_row(comparison, reference, blueprint, recipe, full) for recipe in recipes]
    return rows if comparison.reference == "once" and magnitude else [reference, *rows]


def _recipe_row(
    comparison: Compared,
    reference: SweepRow,
    full: Blueprint,
    recipe: Recipe,
    loaded: Load,
) -> SweepRow:
    condition = reference.condition
    label = f"quantizing {recipe.name}, {condition}"
    folder = comparison.artifacts / f"{recipe.name}-{condition}".replace(":", "-")
    blueprint = quantized_blueprint(
        full, recipe, comparison.calibration, folder, label, resume=comparison.resume
    )
    return SweepRow(
        comparison.label,
        recipe.name,
        partial(blueprint.build, loaded=loaded),
        condition,
        realizable=recipe.realizable,
        scope=comparison.scope,
        recipe_hash=recipe.content_hash,
        storage=_storage(comparison.policy, recipe),
        blueprint=blueprint,
    )


def discard_simulations(comparison: Compared) -> None:
    """Remove what worker processes kept of simulations, which is of no use afterwards."""
    for journal in comparison.artifacts.glob(".*.journal"):
        discard_journal(journal)


def _storage(policy: NativePolicy, recipe: Recipe) -> Storage:
    stored = weight_storage(policy, recipe)
    return Storage(stored.bits_per_weight, stored.weights_16bit, recipe.left_in_16_bits)
