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
from typing import Any

import torch

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.sweep import Footprint, SweepRow
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.outliers import inject_outliers
from omega_qvla.recipe import Recipe, Scope
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy, load
from omega_qvla.runtime.memory import weight_storage

STRESS_FRACTION = 0.03
"""Share of channels per producer that carry outliers (METHOD's published comparisons)."""

TWIN_TOLERANCE = 1e-5
"""Largest relative difference of a float32 action chunk between a policy and its twin."""

PLAIN = "plain"
FULL_PRECISION = "fp32"

QuantizeProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        label: the policy as the user named it.
        policy: full precision.
        checkpoint_bytes: size of its checkpoint.
        calibration: observations for calibration.
        recipes: names or files of recipes; ``methods`` and ``ablations`` are all of their kind.
        magnitudes: stress magnitudes; 0 is the policy as it is.
        scope: ``all`` is each recipe as written, ``paper`` backbone and action head only.
        artifacts: realizable recipes are saved here.
        seed: draws the twin's channels and factors.
    """

    label: str
    policy: NativePolicy
    checkpoint_bytes: int | None
    calibration: Observations
    recipes: Sequence[str]
    magnitudes: Sequence[float]
    scope: Scope
    artifacts: Path
    seed: int = 0


def stress_twin(
    policy: NativePolicy, magnitude: float, *, seed: int = 0, probe: Any | None = None
) -> NativePolicy:
    """The same function with outlier channels in backbone, action head and vision tower.

    Args:
        magnitude: median factor of the chosen channels; 0 returns the policy itself.
        seed: draws channels and factors.
        probe: an observation on which the function is checked to be unchanged.

    Raises:
        PolicyError: the twin's action chunk differs by more than ``TWIN_TOLERANCE``.
    """
    if magnitude == 0:
        return policy
    twin = policy.clone()
    twin.module.load_state_dict(
        {k: v.clone() for k, v in twin.module.state_dict().items()}, assign=True
    )
    twin.module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    pairs = policy.outlier_pairs("all")
    inject_outliers(twin.module, pairs, magnitude, STRESS_FRACTION, generator)
    if probe is not None:
        noise = torch.randn(policy.noise_shape, generator=generator)
        ours = policy.sample_normalized(probe, noise)
        theirs = twin.sample_normalized(probe, noise)
        difference = float((ours - theirs).norm() / ours.norm())
        if not difference <= TWIN_TOLERANCE:
            raise PolicyError(
                f"the stress twin of magnitude {magnitude:g} changed the policy's function by "
                f"{difference:.1e} (allowed {TWIN_TOLERANCE:g}): float32 does not carry outliers "
                "of that size; use a smaller magnitude"
            )
    return twin


def condition_name(magnitude: float) -> str:
    """``plain`` or ``stress:30``."""
    return PLAIN if magnitude == 0 else f"stress:{magnitude:g}"


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

    def full() -> NativePolicy:
        return stress_twin(comparison.policy, magnitude, seed=comparison.seed, probe=probe)

    def quantized(recipe: Recipe) -> Callable[[], Any]:
        def build() -> QuantizedPolicy | SimulatedPolicy:
            label = f"quantizing {recipe.name}, {condition}"
            made = quantize(
                full(),
                comparison.calibration,
                recipe,
                progress=lambda done, total, _site: progress(label, done, total),
            )
            if isinstance(made, SimulatedPolicy):
                return made
            name = f"{recipe.name}-{condition}".replace(":", "-")
            return load(made.save_pretrained(comparison.artifacts / name))

        return build

    rows = [
        SweepRow(
            comparison.label,
            FULL_PRECISION,
            full,
            condition,
            footprint=lambda built: full_footprint(built, comparison.checkpoint_bytes),
            extra={"scope": comparison.scope},
        )
    ]
    for recipe in recipes:
        folder = comparison.artifacts / f"{recipe.name}-{condition}".replace(":", "-")
        rows.append(
            SweepRow(
                comparison.label,
                recipe.name,
                quantized(recipe),
                condition,
                realizable=recipe.realizable,
                footprint=_footprint(folder if recipe.realizable else None),
                extra={"scope": comparison.scope, "recipe_hash": recipe.content_hash},
                derived=_storage(comparison.policy, recipe),
            )
        )
    return rows


def _storage(policy: NativePolicy, recipe: Recipe) -> dict[str, Any]:
    """What a row says of the bits a recipe stores and of what it leaves in 16."""
    storage = weight_storage(policy, recipe)
    return {
        "bits_per_weight": storage.bits_per_weight,
        "weights_16bit": storage.weights_16bit,
        "left_in_16_bits": list(recipe.left_in_16_bits),
    }


def full_footprint(policy: Any, checkpoint_bytes: int | None) -> Footprint:
    """Bytes of a full-precision policy."""
    return Footprint(checkpoint_bytes, sum(p.nbytes for p in policy.module.parameters()))


def _footprint(folder: Path | None) -> Callable[[Any], Footprint]:
    def measure(policy: QuantizedPolicy | SimulatedPolicy) -> Footprint:
        on_disk = None if folder is None else directory_bytes(folder)
        return Footprint(on_disk, policy.resident_bytes())

    return measure


def directory_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
