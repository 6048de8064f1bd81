"""``quantize``: the one verb, from a policy to something that runs on integers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from omega_qvla.calibration.observations import Observations
from omega_qvla.devices import find_gpu
from omega_qvla.policies.base import Observation, Policy
from omega_qvla.quantization.journal import Journal
from omega_qvla.quantization.pipeline import Progress, quantize_policy
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy, build


def quantize(
    policy: Policy,
    observations: Observations | Iterable[Observation],
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    scope: Scope = "all",
    work_directory: str | Path | None = None,
    resume: bool = False,
    progress: Progress = lambda _done, _total, _what: None,
    device: str = "cpu",
) -> QuantizedPolicy | SimulatedPolicy:
    """Quantize a policy without training.

    Args:
        policy: full precision, from ``load_policy`` or a ``TorchPolicy``; it is not modified.
        observations: calibration data.
        recipe: a name (``omega3-w4a4``, ``rtn``, …, see docs/methods.md), a YAML file, or a
            ``Recipe``.
        scope: ``all`` is the recipe as written; ``paper`` quantizes backbone and action head only.
        work_directory: keeps a journal of finished sites here, so that a killed run can resume.
        resume: continue the journal in ``work_directory`` instead of starting again.
        progress: called with (sites done, sites in all, site name).
        device: ``cpu``, or ``cuda`` or ``cuda:N`` to compute on an NVIDIA GPU (docs/gpu.md); the
            policy is on the CPU before and after, and so is what it becomes.

    Returns:
        A ``QuantizedPolicy``, or a ``SimulatedPolicy`` if the recipe cannot exist as integers.
        Either runs on the CPU; ``load(directory, device="cuda")`` puts a saved one on a GPU.

    Raises:
        RecipeError, ObservationError, PolicyError, NonFiniteError, ResumeError, ResourceError.
    """
    gpu = None if device == "cpu" else find_gpu(device)
    chosen = Recipe.load(recipe).scoped(scope)
    journal = None
    if work_directory is not None:
        directory = Path(work_directory)
        journal = partial(Journal, directory, resume=resume)
    return build(
        policy,
        quantize_policy(policy, observations, chosen, journal=journal, progress=progress, gpu=gpu),
    )
