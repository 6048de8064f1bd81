"""Recipes side by side on one policy: what ``demo`` and ``compare`` run.

Every realizable recipe takes the way a user's policy takes: it is quantized, saved as packed
integers, and what is evaluated is what was loaded back from that directory alone.  Simulation-only
recipes are evaluated as simulations and have no checkpoint size.  The stress condition applies all
recipes to the same policy with outliers injected, whose full-precision function is checked to be
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.claims import Claim
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.closed_loop import (
    Episodes,
    Journals,
    Resources,
    simulated,
    sweep_in_metaworld,
)
from omega_qvla.evaluation.comparison_folder import (
    RESULTS,
    Planned,
    require_free_comparison,
    sign,
)
from omega_qvla.evaluation.execution.blueprint import Blueprint
from omega_qvla.evaluation.execution.building import (
    Load,
    full_blueprint,
    quantized_blueprint,
)
from omega_qvla.evaluation.execution.evaluate import Progress
from omega_qvla.evaluation.execution.plan import OpenLoop, Storage, SweepRow
from omega_qvla.evaluation.openloop import NOISES
from omega_qvla.evaluation.outlier_injection import condition_name, outlier_injected
from omega_qvla.evaluation.subjects import (
    REFERENCE,
    Say,
    admit,
    checkpoint_bytes,
    default_calibration,
    resident_bytes,
)
from omega_qvla.files import write_json
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.results.rows import Comparison
from omega_qvla.runtime.prediction import weight_storage
from omega_qvla.threads import torch_threads

RECIPES = ("rtn", "omega-paper", DEFAULT_RECIPE)
"""What is compared where nothing is named."""

Observed = tuple[Observations, Observations]
"""For calibration, and held out for the action error."""


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
    choices: CheckpointOptions
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


def planned_rows(
    policy: str,
    recipes: Sequence[str],
    magnitudes: Sequence[float],
    scope: Scope,
    *,
    episodes: int,
    noises: int,
    held_out: int | None,
) -> Planned:
    """What a comparison of these will have.

    Args:
        episodes: of every row, all tasks together.

    Raises:
        RecipeError: a recipe is unknown or invalid.
    """
    names = [Recipe.load(name).name for name in expand_recipes(recipes)]
    cells = [
        (policy, name, condition_name(magnitude), scope)
        for magnitude in magnitudes
        for name in (REFERENCE, *names)
    ]
    return Planned(cells, episodes, noises, held_out)


def compare(
    policy: str,
    recipes: Sequence[str] = RECIPES,
    *,
    observations: Observed | Callable[[NativePolicy], Observed] | None = None,
    episodes: Episodes | int = 20,
    stress: Sequence[float] = (),
    scope: Scope = "all",
    held_out: int | None = None,
    noises: int = NOISES,
    reference: Literal["each", "once"] = "each",
    out: str | Path = "out/compare",
    resume: bool = False,
    overwrite: bool = False,
    choices: CheckpointOptions | None = None,
    resources: Resources | None = None,
    command: str = "compare",
    say: Say = lambda _line: None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Comparison:
    """Recipes side by side on one policy: quantized, saved, loaded back, run, on the same seeds.

    Without a simulator the closed-loop half is left out, which ``say`` is told.

    Args:
        policy: ``builtin:``, ``random:``, a directory or a hub id, as for ``load_policy``.
        recipes: names or YAML files; ``methods`` and ``ablations`` are all of their kind.
        observations: for calibration and held out, or a function that makes both of the policy;
            None: the policy's own.
        episodes: of Meta-World, per task of the policy with the seeds 0, 1, ...; 0: open loop only.
        stress: magnitudes of injected outliers, each a condition beside the plain one.
        scope: ``all`` is each recipe as written, ``paper`` backbone and action head only.
        held_out: how many of the held-out observations; None: all.
        noises: of each held-out observation.
        reference: full precision in ``each`` condition, or ``once``: outliers do not change it.
        out: artifacts and ``results.json`` go here, finished episodes are kept here.
        resume: go on with what is there, if it was made from the same.
        overwrite: replace what is there.
        choices: answers to what the checkpoint does not say.
        resources: where policies compute; None: this process, more if it is worth it.
        command: what ``made-by.json`` says.
        say: told what is found and decided on the way.
        progress: called with (what, done, all).

    Returns:
        What ``results.json`` holds then; docs/json.md describes it.

    Raises:
        OutputError: ``out`` has results that would be lost, or another process writes there.
        RecipeError, PolicyError, ObservationError, ResumeError, ResourceError: as ``load_policy``,
            ``quantize`` and evaluations raise them.
    """
    target = Path(out)
    resources = resources or Resources()
    run = episodes if isinstance(episodes, Episodes) else Episodes(episodes)
    magnitudes = list(dict.fromkeys([0.0, *stress]))
    resources.require()
    with Claim(target), ExitStack() as computing:
        possible = simulated(run.count, say)
        going_on = resume and (target / RESULTS).exists()
        count = possible * len(run.chosen(policy)) if going_on and possible else 0
        planned = planned_rows(
            policy,
            recipes,
            magnitudes,
            scope,
            episodes=count,
            noises=noises,
            held_out=held_out,
        )
        require_free_comparison(target, planned, command, resume=resume, overwrite=overwrite)
        loaded = load_policy(policy, choices)
        resources = resources.fitted(loaded)
        computing.enter_context(torch_threads(resources.threads or 1))
        calibration, held = _observed(policy, loaded, observations, say)
        compared = Compared(
            label=policy,
            policy=loaded,
            choices=choices or CheckpointOptions(),
            weights=weights_fingerprint(loaded),
            checkpoint_bytes=checkpoint_bytes(policy),
            calibration=calibration,
            recipes=recipes,
            magnitudes=magnitudes,
            scope=scope,
            artifacts=target / "artifacts",
            reference=reference,
            resume=resume,
        )
        identity = {"weights": compared.weights, "calibration": calibration.fingerprint}
        journals = Journals(target / "journals", identity)
        sign(target, command)
        if not resume:
            journals.discard()
        document = sweep_in_metaworld(
            comparison_rows(compared),
            policy,
            replace(run, count=possible),
            OpenLoop(held if held_out is None else held.spread(held_out), noises=noises),
            resources,
            policy_bytes=resident_bytes(loaded),
            journals=journals,
            say=say,
            progress=progress,
        )
        discard_simulations(compared)
        write_json(document.to_json(), target / RESULTS)
        return document


def _observed(
    source: str,
    policy: NativePolicy,
    given: Observed | Callable[[NativePolicy], Observed] | None,
    say: Say,
) -> Observed:
    """Observations for calibration and held out; the policy's own are compared with its training.

    Raises:
        PolicyError: none were given, and the policy brings none.
        ObservationError: they are mostly unlike what it was trained on.
    """
    if callable(given):
        return given(policy)
    if given is None:
        own = default_calibration(source)
        given = Observations.load(own), Observations.load(own, split="heldout")
    for observations in given:
        admit(policy, observations, len(observations), allow=False, say=say)
    return given
