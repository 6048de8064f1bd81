"""Recipes side by side on one policy: what ``demo`` and ``compare`` run.

Every realizable recipe takes the way a user's policy takes: it is quantized, saved as packed
integers, and what is evaluated is what was loaded back from that directory alone.  Simulation-only
recipes are evaluated as simulations and have no checkpoint size.  The stress condition applies all
recipes to the same outlier twin, whose full-precision function is checked to be unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.footprints import artifact_footprint, full_footprint
from omega_qvla.evaluation.prepare import full_blueprint, quantized_blueprint, save_and_load
from omega_qvla.evaluation.sweep import SweepRow
from omega_qvla.evaluation.twin import condition_name, stress_twin
from omega_qvla.policies.checkpoints.choices import Choices
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.recipe import Recipe, Scope
from omega_qvla.runtime.prediction import weight_storage

FULL_PRECISION = "fp32"

QuantizeProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
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
        seed: draws the twin's channels and factors.
        reference: full precision in ``each`` condition, or ``once``, as it is: its twins compute
            the same function, which is checked when they are made.
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


def comparison_rows(comparison: Comparison, progress: QuantizeProgress) -> list[SweepRow]:
    """Full precision and every recipe, under every condition.

    Raises:
        RecipeError: a recipe is unknown or invalid; nothing has been run then.
    """
    names = expand_recipes(comparison.recipes)
    recipes = [Recipe.load(name).scoped(comparison.scope) for name in names]
    return [
        row
        for magnitude in comparison.magnitudes
        for row in _condition_rows(comparison, recipes, magnitude, progress)
    ]


def _condition_rows(
    comparison: Comparison,
    recipes: Iterable[Recipe],
    magnitude: float,
    progress: QuantizeProgress,
) -> list[SweepRow]:
    condition = condition_name(magnitude)
    probe = comparison.calibration[0]
    extra = {"scope": comparison.scope}

    def full() -> NativePolicy:
        return stress_twin(comparison.policy, magnitude, seed=comparison.seed, probe=probe)

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
        FULL_PRECISION,
        full,
        condition,
        footprint=lambda built: full_footprint(built, comparison.checkpoint_bytes),
        extra=extra,
        blueprint=blueprint,
    )
    rows = [
        _recipe_row(comparison, reference, recipe, full, condition, progress) for recipe in recipes
    ]
    return rows if comparison.reference == "once" and magnitude else [reference, *rows]


def _recipe_row(
    comparison: Comparison,
    reference: SweepRow,
    recipe: Recipe,
    full: Callable[[], NativePolicy],
    condition: str,
    progress: QuantizeProgress,
) -> SweepRow:
    label = f"quantizing {recipe.name}, {condition}"
    blueprint = reference.blueprint
    assert blueprint is not None
    folder = comparison.artifacts / f"{recipe.name}-{condition}".replace(":", "-")

    def save() -> Any:
        return save_and_load(
            full,
            comparison.calibration,
            recipe,
            folder,
            label,
            progress,
            full=blueprint.arguments,
            resume=comparison.resume,
        )

    def simulate() -> Any:
        return quantize(
            full(),
            comparison.calibration,
            recipe,
            progress=lambda done, total, _site: progress(label, done, total),
            allow_mismatch=True,  # whoever compares has seen what was found
        )

    on_disk = folder if recipe.realizable else None
    return SweepRow(
        comparison.label,
        recipe.name,
        save if recipe.realizable else simulate,
        condition,
        realizable=recipe.realizable,
        footprint=lambda policy: artifact_footprint(cast(Any, policy), on_disk),
        extra={**reference.extra, "recipe_hash": recipe.content_hash},
        derived=_storage(comparison.policy, recipe),
        blueprint=quantized_blueprint(
            blueprint, recipe, comparison.calibration, folder, label, resume=comparison.resume
        ),
    )


def discard_simulations(comparison: Comparison) -> None:
    """Remove what worker processes kept of simulations, which is of no use afterwards."""
    for journal in comparison.artifacts.glob(".*.journal"):
        discard_journal(journal)


def _storage(policy: NativePolicy, recipe: Recipe) -> dict[str, Any]:
    """What a row says of the bits a recipe stores and of what it leaves in 16."""
    storage = weight_storage(policy, recipe)
    return {
        "bits_per_weight": storage.bits_per_weight,
        "weights_16bit": storage.weights_16bit,
        "left_in_16_bits": list(recipe.left_in_16_bits),
    }
