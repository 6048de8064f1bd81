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
        rows = self.transform_input(x.to(torch.float32))
        scale = self.input_scale(rows)
        rounded = round_activations(rows, scale, self.activation_bits) * scale
        y = F.linear(rounded, self._weight, self._quantized.bias)
        if self._quantized.low_rank is not None:
            y = y + self._quantized.low_rank.apply(x)
        return y.to(x.dtype)

    @property
    def activation_bits(self) -> int:
        """Width of the activation integers."""
        return self._quantized.activations.bits

    def transform_input(self, rows: Tensor) -> Tensor:
        """Rows [..., K] float32 → [..., K'], as they are rounded."""
        return transform_rows(rows, self._quantized.transform)

    def held_bytes(self) -> int:
        """Bytes of the dequantized weight and what goes with it."""
        transform = self._quantized.transform
        return self._weight.nbytes + (0 if transform is None else transform.matrix.nbytes)

    def input_scale(self, transformed: Tensor) -> Tensor:
        """Activation scale of transformed rows: per token [..., 1], or static, [] or [K']."""
        quantized, time = self._quantized, self._clock.time
        times, scales = quantized.activation_times, quantized.activation_scale
        if scales is None or times is None:
            activations = quantized.activations
            return per_token_scale(transformed, activations.bits, activations.clip)
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
