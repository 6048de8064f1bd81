"""What calibration did not see: other tasks, all but one observation, all but a black image.

A policy is calibrated on less than it will meet and measured, open loop, on held-out observations
of everything:

* **pairs**: each pair of the tasks, then the held-out observations of those two (seen) and of the
  others (unseen).  Of four tasks each is seen by three pairs and not by three, so both errors are
  over the same observations and noises, and their ratio is what seeing them is worth;
* **one observation**;
* **one black image**: that observation with all its cameras black.

An observation's share of an error is averaged over the calibrations that count for the condition;
rows are those of a comparison (``sweep.py``), paired over observations in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError
from omega_qvla.evaluation.measured_rows import ActionError, error_ratio
from omega_qvla.evaluation.openloop import (
    Array,
    Measurement,
    error_shares,
    measure_reference,
    measure_row,
)
from omega_qvla.files import write_json
from omega_qvla.policies.base import Observation
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.site import needs_statistics
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.results.rows import Comparison, Row, UnseenRun
from omega_qvla.runtime.prediction import weight_storage

SEEN, UNSEEN = "seen tasks", "unseen tasks"
ONE, BLACK = "one observation", "one black image"
CONDITIONS = (SEEN, UNSEEN, ONE, BLACK)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Unseen:
    """What the cell fixes, beside the benchmark's policies, tasks and observations.

    Attributes:
        version: its name.
        observations: of a pair of tasks, evenly spread over both.
        heldout: held-out observations, evenly spread over all tasks.
        noises: of each of them, drawn from seed 0.
    """

    version: str = "unseen-v1"
    observations: int = 16
    heldout: int = 48
    noises: int = 2


@dataclass(frozen=True)
class Calibration:
    """Observations to calibrate on, and the tasks that they show as they are."""

    name: str
    observations: Observations
    tasks: frozenset[str]


def calibrations(observations: Sequence[Observation], count: int) -> list[Calibration]:
    """Every pair of tasks, one observation, and one black image.

    Args:
        observations: each with its ``task``.
        count: observations of a pair, evenly spread over what there is of each task.

    Raises:
        ObservationError: an observation has no task, or there are fewer than three tasks.
    """
    by_task: dict[str, list[Observation]] = {}
    for number, observation in enumerate(observations):
        if "task" not in observation:
            raise ObservationError(f"observation {number} does not say of which task it is")
        by_task.setdefault(observation["task"], []).append(observation)
    if len(by_task) < 3:
        raise ObservationError(f"unseen tasks need three tasks at least, got {sorted(by_task)}")
    found: list[Calibration] = []
    for pair in combinations(by_task, 2):
        chosen = [o for task in pair for o in Observations(by_task[task]).spread(count // 2)]
        found.append(Calibration(" + ".join(pair), Observations(chosen), frozenset(pair)))
    one = observations[len(observations) // 2]
    found.append(Calibration(ONE, Observations([one]), frozenset()))
    found.append(Calibration(BLACK, Observations([blackened(one)]), frozenset()))
    return found


def blackened(observation: Observation) -> Observation:
    """The same with black images."""
    images = {name: np.zeros_like(image) for name, image in observation["images"].items()}
    return {**observation, "images": images}


def calibrated(recipe: Recipe) -> bool:
    """Whether anything of a recipe depends on the observations."""
    schemes = (recipe.vision, recipe.projector, recipe.backbone, recipe.action_head)
    looks = any(needs_statistics(scheme) for scheme in schemes if scheme is not None)
    return looks or recipe.match_attention


def condition_shares(
    shares: Mapping[str, Array], given: Sequence[Calibration], tasks: Sequence[str]
) -> dict[str, Array]:
    """Shares [n] of each condition's error from those of each calibration.

    Args:
        shares: by the calibration's name, [n] each.
        given: the calibrations.
        tasks: of each of the n observations.
    """
    pairs = [calibration for calibration in given if calibration.tasks]
    seen = np.array([[task in pair.tasks for task in tasks] for pair in pairs])
    values = np.stack([shares[pair.name] for pair in pairs])
    return {
        SEEN: np.where(seen, values, 0.0).sum(axis=0) / seen.sum(axis=0),
        UNSEEN: np.where(seen, 0.0, values).sum(axis=0) / (~seen).sum(axis=0),
        ONE: shares[ONE],
        BLACK: shares[BLACK],
    }


def measure_unseen(
    policy: NativePolicy,
    label: str,
    recipes: Sequence[Recipe],
    observations: Observations,
    heldout: Observations,
    *,
    definition: Unseen,
    weights: str,
    partial: Path,
    resume: bool,
    progress: Progress,
    machine: str,
    command: str,
) -> Comparison:
    """Every recipe in every condition.

    Args:
        policy: full precision; ``label`` is its name.
        observations, heldout: all that there are, each with its task.
        weights: fingerprint of the policy's weights.
        partial: what was measured so far is kept here until all is.
        resume: take what is there, if it was measured of the same.
        progress: called with (label, calibrations done, all of them) for each recipe.
        machine, command: what made them.

    Returns:
        One row per recipe and condition; those of unseen tasks have ``unseen_over_seen``.

    Raises:
        ObservationError: observations do not tell their tasks.
    """
    held = heldout.spread(definition.heldout)
    given = calibrations(observations, definition.observations)
    reference = measure_reference(policy, list(held), 0, definition.noises)
    identity: dict[str, Any] = {
        "definition": asdict(definition),
        "weights": weights,
        "calibration": observations.fingerprint,
        "heldout": held.fingerprint,
        "library": f"omega-qvla {version('omega-qvla')}",
    }
    journal = _Partial(partial, identity, resume=resume)
    tasks = [observation["task"] for observation in held]
    found: dict[str, dict[str, Array]] = {}
    for recipe in recipes:
        shares: dict[str, Array] = {}
        for number, calibration in enumerate(given):
            progress(f"{label}, {recipe.name}", number, len(given))
            # Without statistics every calibration gives the same policy.
            key = f"{recipe.content_hash} {calibration.name if calibrated(recipe) else 'none'}"
            if key not in journal.shares:
                # Black images and a single task are what this measures.
                made = quantize(policy, calibration.observations, recipe, allow_mismatch=True)
                journal.add(key, _measured(made, held, reference, definition))
            shares[calibration.name] = np.array(journal.shares[key])
        progress(f"{label}, {recipe.name}", len(given), len(given))
        found[recipe.name] = condition_shares(shares, given, tasks)
    rows = [
        _row(policy, label, recipe, condition, found, reference, definition)
        for condition in CONDITIONS
        for recipe in recipes
    ]
    partial.unlink(missing_ok=True)
    return Comparison(
        policy=label, rows=rows, unseen=UnseenRun(**identity, machine=machine, command=command)
    )


def _measured(
    made: Any, held: Observations, reference: Measurement, definition: Unseen
) -> list[float]:
    units = reference.normalized
    ours = measure_row(made, list(held), 0, definition.noises, normalized=units)
    return [float(f"{share:.6g}") for share in error_shares(ours.chunks, reference.chunks)]


def _row(
    policy: NativePolicy,
    label: str,
    recipe: Recipe,
    condition: str,
    found: Mapping[str, Mapping[str, Array]],
    reference: Measurement,
    definition: Unseen,
) -> Row:
    shares, of_default = found[recipe.name][condition], None
    if recipe.name != DEFAULT_RECIPE and DEFAULT_RECIPE in found:
        of_default = found[DEFAULT_RECIPE][condition]
    error = ActionError.of(shares, of_default)
    return Row(
        policy=label,
        recipe=recipe.name,
        condition=condition,
        realizable=recipe.realizable,
        success={},
        success_mean=None,
        success_ci95=None,
        action_error=error.action_error,
        noise_floor=reference.floor,
        action_error_ci95=error.action_error_ci95,
        action_errors=error.action_errors,
        error_vs_default=error.error_vs_default,
        noises=definition.noises,
        smoothness=None,
        drift=None,
        checkpoint_bytes=None,
        resident_bytes=None,
        ms_per_chunk=None,
        seeds=[],
        episodes=0,
        smoke=True,
        paired_vs_reference=None,
        scope="all",
        recipe_hash=recipe.content_hash,
        bits_per_weight=weight_storage(policy, recipe).bits_per_weight,
        unseen_over_seen=(
            error_ratio(shares, found[recipe.name][SEEN]) if condition == UNSEEN else None
        ),
    )


class _Partial:
    """Shares that were measured, by recipe and calibration, in a file until all are."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self._path = path
        content = json.dumps(identity, sort_keys=True)
        self._identity = hashlib.sha256(content.encode()).hexdigest()
        self.shares: dict[str, list[float]] = {}
        if resume and path.exists():
            known = json.loads(path.read_text("utf-8"))
            if known["identity"] == self._identity:
                self.shares = known["shares"]

    def add(self, key: str, shares: list[float]) -> None:
        self.shares[key] = shares
        write_json({"identity": self._identity, "shares": self.shares}, self._path)
