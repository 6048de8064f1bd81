"""The outlier stress twin: large activations, the same function.

Small policies trained from scratch lack the outlier channels of billion-parameter ones, and four
bits hardly hurt them.  The twin makes them as hard to quantize without changing what they compute:
a channel is multiplied by f where it is produced and divided by f in every linear that reads it.
This reverses what balancing does (SmoothQuant, arXiv 2211.10438), and it works wherever nothing
nonlinear lies between producer and consumers:

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

and column j of every consumer is divided by f.  Which norm feeds which linears is the policy's
knowledge and comes in as a list of :class:`OutlierPair`.

Factors are log-normal around the magnitude, f = magnitude · exp(½ z), z ~ N(0, 1): real outlier
channels differ among themselves, and equal factors would be undone by one scale per group.  With
magnitude 30 two thirds lie between 18 and 49.

A stress twin is a test instrument.  Never present it as a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError

SPREAD = 0.5
"""Standard deviation of log f."""


OutlierKind = Literal["rms_norm", "layer_norm", "adaptive_norm", "adaptive_layer_norm", "linear"]
"""How a producer stores its gain; see the table above."""

_PARTS = {"adaptive_norm": 3, "adaptive_layer_norm": 2}
"""How many of ``_PART_NAMES`` the dense layer of an adaptive norm produces."""

_PART_NAMES = ("scale", "shift", "gate")


class OutlierPairLike(Protocol):
    """What a policy's own description of a pair must offer; ``OutlierPair`` is one."""

    @property
    def kind(self) -> OutlierKind: ...
    @property
    def producer(self) -> str: ...
    @property
    def consumers(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class OutlierPair:
    """A producer of channels and everything that reads them.

    Attributes:
        kind: how the producer stores its gain, see the table above.
        producer: dotted path of the norm, of the adaptive norm's dense linear, or of the linear.
        consumers: dotted paths of all linears that read the producer's output.
    """

    kind: OutlierKind
    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class InjectedOutliers:
    """What was done to one pair: channels [n] int64 and their factors [n] float32."""

    pair: OutlierPairLike
    channels: Tensor
    factors: Tensor


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
    pairs: Iterable[OutlierPairLike],
    magnitude: float,
    fraction: float,
    generator: torch.Generator,
) -> list[InjectedOutliers]:
    """Turn a module into its stress twin, in place.

    All pairs are checked before the first weight is touched.  Channels and factors are drawn pair
    by pair in the given order, so the same generator state gives the same twin.

    Args:
        module: the full-precision network.
        pairs: from the policy family, for example ``pi05_outlier_pairs``.
        magnitude: median factor, 30 in the published comparisons.
        fraction: share of channels per producer, 0.03 in the published comparisons.
        generator: a CPU generator; the only source of randomness.

    Returns:
        What was done, per pair.

    Raises:
        PolicyError: a path does not exist, is not of its kind, widths differ, or a consumer is
            listed twice.
        ValueError: magnitude or fraction out of range.
    """
    pairs = list(pairs)
    widths = [_checked_width(module, pair) for pair in pairs]
    _refuse_shared_consumers(pairs)
    drawn: list[InjectedOutliers] = []
    for pair, width in zip(pairs, widths, strict=True):
        channels = choose_channels(width, fraction, generator)
        factors = choose_factors(channels.numel(), magnitude, generator)
        drawn.append(InjectedOutliers(pair, channels, factors))
    with torch.no_grad():
        for injected, width in zip(drawn, widths, strict=True):
            factor = expand_factors(width, injected.channels, injected.factors)
            _apply(module, injected.pair, factor)
    return drawn


def _apply(module: nn.Module, pair: OutlierPairLike, factor: Tensor) -> None:
    """Scale the producer and divide the consumers of one checked pair."""
    producer = module.get_submodule(pair.producer)
    weight = cast(Tensor, producer.weight)
    bias = cast("Tensor | None", getattr(producer, "bias", None))
    factor = factor.to(weight.device)
    if pair.kind == "rms_norm":
        weight.copy_(scale_offset_gain(weight, factor))
    elif pair.kind in _PARTS:
        assert bias is not None
        new_weight, new_bias = scale_modulation(weight, bias, factor)
        weight.copy_(new_weight)
        bias.copy_(new_bias)
    else:
        weight.copy_(scale_rows(weight, factor))
        if bias is not None:
            bias.copy_(scale_rows(bias, factor))
    for path in pair.consumers:
        consumer = cast(nn.Linear, module.get_submodule(path))
        consumer.weight.copy_(divide_columns(consumer.weight, factor.to(consumer.weight.device)))


def _checked_width(module: nn.Module, pair: OutlierPairLike) -> int:
    """Number of channels a pair connects, after checking that it fits the module."""
    producer = _submodule(module, pair.producer)
    weight = getattr(producer, "weight", None)
    if not isinstance(weight, Tensor):
        raise PolicyError(f"outlier producer {pair.producer!r} has no weight")
    linear = isinstance(producer, nn.Linear)
    if linear != (pair.kind == "linear" or pair.kind in _PARTS):
        raise PolicyError(
            f"outlier producer {pair.producer!r} is a {type(producer).__name__}, "
            f"which does not fit kind {pair.kind!r}"
        )
    width = weight.shape[0]
    parts = _PARTS.get(pair.kind, 1)
    if parts > 1:
        if width % parts or producer.bias is None:
            raise PolicyError(
                f"{pair.producer!r} must produce ({', '.join(_PART_NAMES[:parts])}) with a bias, "
                f"its weight is {list(weight.shape)}"
            )
        width //= parts
    if not pair.consumers:
        raise PolicyError(f"outlier producer {pair.producer!r} has no consumers to compensate it")
    for path in pair.consumers:
        consumer = _submodule(module, path)
        if not isinstance(consumer, nn.Linear) or consumer.in_features != width:
            raise PolicyError(
                f"outlier consumer {path!r} must be a linear that reads the {width} channels "
                f"of {pair.producer!r}"
            )
    return width


def _refuse_shared_consumers(pairs: list[OutlierPairLike]) -> None:
    """A linear reads one input, so it can compensate one producer."""
    seen: dict[str, str] = {}
    for pair in pairs:
        for path in pair.consumers:
            if path in seen:
                raise PolicyError(
                    f"outlier consumer {path!r} is listed for {seen[path]!r} and again for "
                    f"{pair.producer!r}; a linear reads one input"
                )
            seen[path] = pair.producer


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise PolicyError(f"the module has no submodule {path!r}: {error}") from error
