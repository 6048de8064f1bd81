"""Quantized linears in floating point: what calibration runs, and all a simulation-only recipe has.

``SimulatedLinear`` rounds activations and weights to the same integers as the runtime does and
multiplies their dequantized values.  Calibration uses it to let later sites see the errors of
earlier ones; a recipe whose scales cannot exist in an integer product (one per input channel) can
be run in no other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.policies.base import FlowClock
from omega_qvla.quantization.activations import (
    interpolate_scales,
    per_token_scale,
    round_activations,
)
from omega_qvla.quantization.embedding import QuantizedRows
from omega_qvla.quantization.site import QuantizedSite, transform_rows


class SimulatedLinear(nn.Module):
    """Drop-in for the linears of one site, computing in floating point.

    An output rotation is undone in the dequantized weight, once: (x' W'ᵀ) Rᵀ = x' (R W')ᵀ.
    """

    def __init__(self, quantized: QuantizedSite, clock: FlowClock) -> None:
        super().__init__()
        self.splits = quantized.splits
        self.in_features = quantized.in_features
        self.out_features = sum(quantized.splits)
        self._quantized = quantized
        self._clock = clock
        weight = quantized.weight.dequantize()
        if quantized.output_rotation is not None:
            weight = quantized.output_rotation.undo(weight.t()).t().contiguous()
        self._weight = weight
        self._scales: dict[float | None, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], through integers and back."""
        quantized = self._quantized
        rows = transform_rows(x.to(torch.float32), quantized.transform)
        scale = self._scale(rows)
        rounded = round_activations(rows, scale, quantized.activations.bits) * scale
        y = F.linear(rounded, self._weight, quantized.bias)
        if quantized.low_rank is not None:
            y = y + quantized.low_rank.apply(x)
        return y.to(x.dtype)

    def held_bytes(self) -> int:
        """Bytes of the dequantized weight and what goes with it."""
        transform = self._quantized.transform
        return self._weight.nbytes + (0 if transform is None else transform.matrix.nbytes)

    def _scale(self, rows: Tensor) -> Tensor:
        quantized, time = self._quantized, self._clock.time
        times, scales = quantized.activation_times, quantized.activation_scale
        if scales is None or times is None:
            return per_token_scale(rows, quantized.activations.bits, quantized.activations.clip)
        if time not in self._scales:
            self._scales[time] = interpolate_scales(times, scales, time)
        return self._scales[time]


class SimulatedEmbedding(nn.Module):
    """Token embedding that dequantizes the rows looked up."""

    def __init__(self, rows: QuantizedRows) -> None:
        super().__init__()
        self._rows = rows

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] → float32 [..., D]."""
        return self._rows.lookup(token_ids)


def install(module: nn.Module, linears: Sequence[str], replacement: nn.Module) -> None:
    """Put ``replacement`` in the place of a site's first linear and empty the other places."""
    first, *others = linears
    _set(module, first, replacement)
    for name in others:
        _set(module, name, None)


def _set(module: nn.Module, path: str, value: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
