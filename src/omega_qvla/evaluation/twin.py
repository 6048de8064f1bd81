"""The stress twin of a policy: the same function, with outliers planted (docs/stress-twin.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_outliers import gr00t_outlier_pairs
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.outlier_paths import OutlierPath
from omega_qvla.policies.pi05_outliers import pi05_outlier_pairs
from omega_qvla.quantization.outliers import inject_outliers

STRESS_FRACTION = 0.03
"""Share of channels per producer that carry outliers (METHOD's published comparisons)."""

TWIN_TOLERANCE = 1e-5
"""Largest relative difference of a float32 action chunk between a policy and its twin."""

PLAIN = "plain"

_PAIRS: Mapping[str, Callable[..., Sequence[OutlierPath]]] = {
    "pi05": pi05_outlier_pairs,
    "gr00t_n15": gr00t_outlier_pairs,
}


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
    pairs = _PAIRS[policy.family](policy.config, "all")
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
