"""Outlier injection: large activations, the same function (docs/outlier-injection.md).

Small policies trained from scratch lack the outlier channels of billion-parameter ones, and four
bits hardly hurt them.  Injected outliers make them as hard to quantize without changing what they
compute: a channel is multiplied by f where it is produced and divided by f in every linear that
reads it.  This reverses what smoothing does (SmoothQuant, arXiv 2211.10438), and it works wherever
nothing nonlinear lies between producer and consumers:

=============  ==========================================  ====================================
kind           producer                                    change for channel j
=============  ==========================================  ====================================
rms_norm       gain stored as an offset, y = x̂ (1 + w)     w ← f (1 + w) - 1
layer_norm     y = x̂ w + b (or an RMS norm: no b)          w ← f w,  b ← f b
adaptive_norm  dense → (scale, shift, gate),               scale row ← f row, bias ← f (1 + b) - 1
               y = x̂ (1 + scale) + shift                   shift row ← f row, bias ← f b
adaptive_      the same without a gate                     the same
layer_norm
linear         y = x Wᵀ + b (``up_proj``; only             row ← f row, b ← f b
               multiplied by the gate before it is read)
=============  ==========================================  ====================================

and column j of every consumer is divided by f.  Which norm feeds which linears is said
by ``outlier_paths.py``.

Factors are log-normal around the magnitude, f = magnitude · exp(½ z), z ~ N(0, 1): real outlier
channels differ among themselves, and equal factors would be undone by one scale per group.  With
magnitude 30 two thirds lie between 18 and 49.

An outlier-injected policy is a test instrument.  Never present it as a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.outlier_paths import OutlierPath, outlier_paths
from omega_qvla.policies.native import NativePolicy

SPREAD = 0.5
"""Standard deviation of log f."""

FRACTION = 0.03
"""Share of channels per producer that carry outliers."""

TOLERANCE = 1e-5
"""Largest relative difference of a float32 action chunk that injecting may make."""

PLAIN = "plain"

_PARTS = {"adaptive_norm": 3, "adaptive_layer_norm": 2}
"""How many of ``_PART_NAMES`` the dense layer of an adaptive norm produces."""

_PART_NAMES = ("scale", "shift", "gate")


@dataclass(frozen=True)
class InjectedOutliers:
    """What was done at one path: channels [n] int64 and their factors [n] float32."""

    path: OutlierPath
    channels: Tensor
    factors: Tensor


def outlier_injected(
    policy: NativePolicy, magnitude: float, *, seed: int = 0, probe: Any | None = None
) -> NativePolicy:
    """The same function with outlier channels in backbone, action head and vision tower.

    Args:
        magnitude: median factor of the chosen channels; 0 returns the policy itself.
        seed: draws channels and factors.
        probe: an observation on which the function is checked to be unchanged.

    Raises:
        PolicyError: the action chunk differs by more than ``TOLERANCE``, or nothing is known of the
            policy's family.
    """
    if magnitude == 0:
        return policy
    paths = outlier_paths(policy, "all")
    injected = policy.clone()
    injected.module.load_state_dict(
        {k: v.clone() for k, v in injected.module.state_dict().items()}, assign=True
    )
    injected.module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    inject_outliers(injected.module, paths, magnitude, FRACTION, generator)
    if probe is not None:
        noise = torch.randn(policy.noise_shape, generator=generator)
        ours = policy.sample_normalized(probe, noise)
        theirs = injected.sample_normalized(probe, noise)
        difference = float((ours - theirs).norm() / ours.norm())
        if not difference <= TOLERANCE:
            raise PolicyError(
                f"injecting outliers of magnitude {magnitude:g} changed the policy's function by "
                f"{difference:.1e} (allowed {TOLERANCE:g}): float32 does not carry outliers of "
                "that size; use a smaller magnitude"
            )
    return injected


def condition_name(magnitude: float) -> str:
    """``plain`` or ``stress:30``."""
    return PLAIN if magnitude == 0 else f"stress:{magnitude:g}"


def choose_channels(width: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Draw distinct channels, round(fraction · width) but at least one → sorted [n] int64.

    Raises:
        ValueError: fraction not in (0, 1], or no channels.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the fraction of outlier channels must be in (0, 1], got {fraction}")
    if width < 1:
        raise ValueError(f"cannot choose channels of a tensor of width {width}")
    count = max(1, round(fraction * width))
    return torch.randperm(width, generator=generator)[:count].sort().values


def choose_factors(count: int, magnitude: float, generator: torch.Generator) -> Tensor:
    """Draw factors magnitude · exp(½ z) → [count] float32.

    Raises:
        ValueError: magnitude is not a positive finite number.
    """
    if not (math.isfinite(magnitude) and magnitude > 0.0):
        raise ValueError(f"the outlier magnitude must be positive and finite, got {magnitude}")
    z = torch.randn(count, generator=generator, dtype=torch.float64)
    return (magnitude * (SPREAD * z).exp()).to(torch.float32)


def expand_factors(width: int, channels: Tensor, factors: Tensor) -> Tensor:
    """Factors of the chosen channels, ones elsewhere → [width] float64."""
    full = torch.ones(width, dtype=torch.float64, device=channels.device)
    full[channels] = factors.to(torch.float64)
    return full


def scale_offset_gain(weight: Tensor, factor: Tensor) -> Tensor:
    """Gain stored as an offset from one, [D] → f (1 + w) - 1, in w's dtype."""
    return (factor * (1.0 + weight.to(torch.float64)) - 1.0).to(weight.dtype)


def scale_rows(weight: Tensor, factor: Tensor) -> Tensor:
    """Rows of [N, ...] times factor [N], in the weight's dtype (gains and biases: [N])."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    return (weight.to(torch.float64) * factor.reshape(shape)).to(weight.dtype)


def divide_columns(weight: Tensor, factor: Tensor) -> Tensor:
    """Columns of [N, K] over factor [K], in the weight's dtype."""
    return (weight.to(torch.float64) / factor).to(weight.dtype)


def scale_modulation(weight: Tensor, bias: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Scale an adaptive norm through the dense layer that produces (scale, shift, gate).

    1 + scale' = f (1 + scale) and shift' = f · shift for every condition; the gate acts on the
    branch's output and stays.

    Args:
        weight: [3D, C], rows stacked as scale, shift, gate; [2D, C] without a gate.
        bias: [3D] or [2D].
        factor: [D].

    Returns:
        The new weight and bias.
    """
    scale, shift, *gate = bias.split(len(factor))
    ones = [torch.ones_like(factor) for _ in gate]
    new_weight = scale_rows(weight, torch.cat((factor, factor, *ones)))
    new_bias = torch.cat((scale_offset_gain(scale, factor), scale_rows(shift, factor), *gate))
    return new_weight, new_bias


def inject_outliers(
    module: nn.Module,
    paths: Iterable[OutlierPath],
    magnitude: float,
    fraction: float,
    generator: torch.Generator,
) -> list[InjectedOutliers]:
    """Inject outliers into a module, in place.

    All paths are checked before the first weight is touched.  Channels and factors are drawn path
    by path in the given order, so the same generator state gives the same outliers.

    Args:
        module: the full-precision network.
        paths: from ``outlier_paths.py``.
        magnitude: median factor, 30 in the published comparisons.
        fraction: share of channels per producer, 0.03 in the published comparisons.
        generator: a CPU generator; the only source of randomness.

    Returns:
        What was done, per path.

    Raises:
        PolicyError: a path does not exist, is not of its kind, widths differ, or a consumer is
            listed twice.
        ValueError: magnitude or fraction out of range.
    """
    paths = list(paths)
    widths = [_checked_width(module, path) for path in paths]
    _refuse_shared_consumers(paths)
    drawn: list[InjectedOutliers] = []
    for path, width in zip(paths, widths, strict=True):
        channels = choose_channels(width, fraction, generator)
        factors = choose_factors(channels.numel(), magnitude, generator)
        drawn.append(InjectedOutliers(path, channels, factors))
    with torch.no_grad():
        for injected, width in zip(drawn, widths, strict=True):
            factor = expand_factors(width, injected.channels, injected.factors)
            _apply(module, injected.path, factor)
    return drawn


def _apply(module: nn.Module, path: OutlierPath, factor: Tensor) -> None:
    """Scale the producer and divide the consumers of one checked path."""
    producer = module.get_submodule(path.producer)
    weight = cast(Tensor, producer.weight)
    bias = cast("Tensor | None", getattr(producer, "bias", None))
    factor = factor.to(weight.device)
    if path.kind == "rms_norm":
        weight.copy_(scale_offset_gain(weight, factor))
    elif path.kind in _PARTS:
        assert bias is not None
        new_weight, new_bias = scale_modulation(weight, bias, factor)
        weight.copy_(new_weight)
        bias.copy_(new_bias)
    else:
        weight.copy_(scale_rows(weight, factor))
        if bias is not None:
            bias.copy_(scale_rows(bias, factor))
    for name in path.consumers:
        consumer = cast(nn.Linear, module.get_submodule(name))
        consumer.weight.copy_(divide_columns(consumer.weight, factor.to(consumer.weight.device)))


def _checked_width(module: nn.Module, path: OutlierPath) -> int:
    """Number of channels a path connects, after checking that it fits the module."""
    producer = _submodule(module, path.producer)
    weight = getattr(producer, "weight", None)
    if not isinstance(weight, Tensor):
        raise PolicyError(f"outlier producer {path.producer!r} has no weight")
    linear = isinstance(producer, nn.Linear)
    if linear != (path.kind == "linear" or path.kind in _PARTS):
        raise PolicyError(
            f"outlier producer {path.producer!r} is a {type(producer).__name__}, "
            f"which does not fit kind {path.kind!r}"
        )
    width = weight.shape[0]
    parts = _PARTS.get(path.kind, 1)
    if parts > 1:
        if width % parts or producer.bias is None:
            raise PolicyError(
                f"{path.producer!r} must produce ({', '.join(_PART_NAMES[:parts])}) with a bias, "
                f"its weight is {list(weight.shape)}"
            )
        width //= parts
    if not path.consumers:
        raise PolicyError(f"outlier producer {path.producer!r} has no consumers to compensate it")
    for name in path.consumers:
        consumer = _submodule(module, name)
        if not isinstance(consumer, nn.Linear) or consumer.in_features != width:
            raise PolicyError(
                f"outlier consumer {name!r} must be a linear that reads the {width} channels "
                f"of {path.producer!r}"
            )
    return width


def _refuse_shared_consumers(paths: list[OutlierPath]) -> None:
    """A linear reads one input, so it can compensate one producer."""
    seen: dict[str, str] = {}
    for path in paths:
        for name in path.consumers:
            if name in seen:
                raise PolicyError(
                    f"outlier consumer {name!r} is listed for {seen[name]!r} and again for "
                    f"{path.producer!r}; a linear reads one input"
                )
            seen[name] = path.producer


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise PolicyError(f"the module has no submodule {path!r}: {error}") from error
