"""Quantizing on the GPU at hand, compared with the CPU and timed; ``benchmarks/gpu.py`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from gpu_checks import MismatchError
from torch import Tensor

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import RecipeError
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.gpu_memory import gpu_bytes
from omega_qvla.quantization.pipeline import work_shares
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe

_COMPARED = 4
"""Observations that both devices calibrate to and are judged by."""
_TIMED = 8
"""Observations a full-size policy is calibrated to."""


def compare_quantizing(name: str, device: str, recipe: str, most: float = 1.2) -> dict[str, float]:
    """The same policy quantized on GPU and CPU, both run on the CPU.

    The two round sums differently, so that a weight half-way between two integers may go either
    way, and GPTQ carries that on: integers need not be equal.  What must be equal is how good they
    are: the error of chunks against full precision, over the calibration observations.

    Args:
        name: of a policy with embedded observations.
        device: ``cuda`` or ``cuda:N``.
        recipe: of integers, by name.
        most: how many times the CPU's error the GPU's may be.

    Raises:
        MismatchError: it is more.
        RecipeError: the recipe is a simulation.
    """
    policy = load_policy(name)
    observations = [Observations.load(name)[number] for number in range(_COMPARED)]
    noise = torch.randn(policy.noise_shape, generator=torch.Generator().manual_seed(0))
    full = torch.stack([policy.sample_normalized(item, noise) for item in observations])
    errors: list[float] = []
    words: list[Tensor] = []
    for where in ("cpu", device):
        made = quantize(policy, observations, recipe, device=where).policy
        buffers = dict(made.module.named_buffers())
        packed = [x.flatten() for key, x in buffers.items() if key.endswith("weight_packed")]
        if not packed or not isinstance(made, NativePolicy):
            raise RecipeError(f"recipe {recipe!r} gives no integers to compare")
        chunks = torch.stack([made.sample_normalized(item, noise) for item in observations])
        errors.append(float((chunks - full).square().sum() / full.square().sum()))
        words.append(torch.cat(packed))
    if not errors[1] <= most * errors[0]:
        raise MismatchError(
            f"{name} with {recipe}: quantized on {device} its actions are wrong by "
            f"{errors[1]:.3g}, quantized on the CPU by {errors[0]:.3g}"
        )
    return {
        "action_error_cpu": errors[0],
        "action_error_gpu": errors[1],
        "words_equal": float((words[0] == words[1]).to(torch.float64).mean()),
    }


def measure_quantizing(
    name: str, device: str, work: Path, report: Callable[[dict[str, Any]], None]
) -> None:
    """Quantize a streamed policy with the default recipe, calibrated to noise.

    ``report`` is told before every site how far it is (docs/json.md), so that a run that is cut
    short has said what it took until then, and once more when the policy is built.

    Args:
        name: of the policy, as for ``stream_policy``.
        device: ``cuda`` or ``cuda:N``.
        work: folder of the journal.
        report: called with the whole row.
    """
    policy, recipe = stream_policy(name), Recipe.load(DEFAULT_RECIPE)
    config = policy.config
    size = config.vision.image_size
    observations = Observations.random(config.cameras, config.state_dim, count=_TIMED, size=size)
    shares = work_shares(policy, recipe)
    row: dict[str, Any] = {
        "policy": name,
        "recipe": recipe.name,
        "observations": len(observations),
        "sites": len(shares) - 1,
        "gpu_bytes_asked": gpu_bytes(policy, recipe),
    }
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begin = perf_counter()

    def tell(done: int, *, finished: bool = False) -> None:
        seconds = perf_counter() - begin
        row.setdefault("seconds_until_first_site", seconds)
        row.update(
            sites_done=done,
            share_of_work=shares[done],
            minutes=seconds / 60,
            gpu_bytes_peak=torch.cuda.max_memory_allocated(device) if cuda else None,
            finished=finished,
        )
        report(dict(row))

    quantize(
        policy,
        observations,
        recipe,
        work_directory=work,
        progress=lambda done, _total, _site: tell(done),
        device=device,
    )
    tell(len(shares) - 1, finished=True)
