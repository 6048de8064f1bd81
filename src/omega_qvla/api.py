"""``quantize``: the one verb, from a policy to something that runs on integers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from omega_qvla.calibration.mismatch import check
from omega_qvla.calibration.observations import Observations, as_observations
from omega_qvla.devices import find_gpu
from omega_qvla.policies.base import Observation, Policy
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.journal import Journal
from omega_qvla.quantization.pipeline import Progress, quantize_policy
from omega_qvla.quantization.rehearsal import rehearse
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy, build
from omega_qvla.threads import check_threads, fitting_threads, torch_threads, widest_linear


def quantize(
    policy: Policy,
    observations: Observations | Iterable[Observation],
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    scope: Scope = "all",
    work_directory: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "cpu",
    allow_mismatch: bool = False,
    threads: int | None = None,
) -> QuantizedPolicy | SimulatedPolicy:
    """Quantize a policy without training.

    A ``TorchPolicy`` is sampled on the first observation before the work, as it is and with its
    linears replaced (``quantization/rehearsal.py``), and once more when it is quantized.

    Args:
        policy: full precision, from ``load_policy`` or a ``TorchPolicy``; it is not modified.
        observations: calibration data.
        recipe: a name (``omega-w4a4``, ``rtn``, …, see docs/methods.md), a YAML file, or a
            ``Recipe``.
        scope: ``all`` is the recipe as written; ``paper`` quantizes backbone and action head only.
        work_directory: keeps a journal of finished sites here, so that a killed run can resume.
        resume: continue the journal in ``work_directory``; without it, one with finished sites is
            refused, so that nothing is lost by mistake.
        progress: called with (sites done, sites in all, site name); None writes a line on a
            terminal's standard error, and nothing elsewhere.
        device: ``cpu``, or ``cuda`` or ``cuda:N`` to compute on an NVIDIA GPU (docs/gpu.md); the
            policy is on the CPU before and after, and so is what it becomes.
        allow_mismatch: go on with observations that are mostly unlike what the policy was trained
            on (docs/calibration.md); they are refused otherwise.  Those that are partly so are
            warned of (``CalibrationWarning``); what was warned of stays in the artifact.
        threads: of PyTorch, at most; None is ``torch.get_num_threads()``.  A policy whose linears
            all have less than a million weights is quantized on one: that is faster, and gives the
            same bytes whatever is asked for.  The bytes of a larger one depend on the number
            (docs/artifact.md).  Afterwards PyTorch has as many threads as before.

    Returns:
        A ``QuantizedPolicy``, or a ``SimulatedPolicy`` if the recipe cannot exist as integers.
        Either runs on the CPU; ``load(directory, device="cuda")`` puts a saved one on a GPU.

    Raises:
        OutputError: another process is computing sites for the journal.
        RecipeError: there is no such recipe, or it does not fit the policy.
        ObservationError: observations that the policy cannot take, or unlike its training data.
        PolicyError: a module that cannot be quantized.
        NonFiniteError: NaN or Inf in weights or activations; site and step are named.
        ResumeError: the journal belongs to other work.
        ResourceError: not enough memory, or a device that cannot be used.
    """
    if threads is not None:
        check_threads(threads)
    gpu = None if device == "cpu" else find_gpu(device)
    chosen = Recipe.load(recipe).scoped(scope)
    given = as_observations(observations)
    warned = check(policy, given, chosen.observations, allow=allow_mismatch)
    with (
        torch_threads(fitting_threads(widest_linear(policy.module), threads)),
        ExitStack() as until_built,  # a streamed policy's sites are read from its journal
    ):
        rehearsal = None
        if isinstance(policy, TorchPolicy) and gpu is None:
            rehearsal = rehearse(policy, given.spread(chosen.observations)[0], chosen)
            policy = rehearsal.policy

        def journal(header: dict[str, str]) -> Journal:
            assert work_directory is not None
            opened = Journal(Path(work_directory), header, chosen, resume=resume)
            return until_built.enter_context(opened)

        keeping = None if work_directory is None else journal
        told = until_built.enter_context(_line_on_terminal()) if progress is None else progress
        quantization = quantize_policy(
            policy, given, chosen, journal=keeping, progress=told, gpu=gpu
        )
        quantized = build(policy, replace(quantization, warnings=tuple(warned)))
        if rehearsal is not None:
            rehearsal.check(quantized.policy)
        return quantized


@contextmanager
def _line_on_terminal() -> Iterator[Progress]:
    """Progress on one line of a terminal, which is cleared at the end."""
    if not sys.stderr.isatty():
        yield lambda _done, _total, _what: None
        return
    try:
        yield lambda done, total, what: _write_line(f"quantizing {done}/{total} {what}")
    finally:
        _write_line("")


def _write_line(text: str) -> None:
    """Replace the last line of a terminal."""
    sys.stderr.write(f"\r{text}\x1b[K")
    sys.stderr.flush()
