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

from omega_qvla.flow_time import FlowClock, place
from omega_qvla.policies.base import Policy
from omega_qvla.policies.slots import fill_slots
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.activations import (
    per_token_scale,
    round_activations,
)
from omega_qvla.quantization.embedding import QuantizedRows, scale_rows
from omega_qvla.quantization.low_rank import LowRankBranch
from omega_qvla.quantization.site import QuantizedSite, transform_rows
from omega_qvla.quantization.transforms import BlockTransform


class SimulatedLinear(nn.Module):
    """Drop-in for the linears of one site, computing in floating point.

    An output rotation is undone in the dequantized weight, once: (x' W'ᵀ) Rᵀ = x' (R W')ᵀ.  All
    tensors are buffers, so that the module computes where its policy is put.
    """

    _weight: Tensor
    _bias: Tensor | None
    _matrix: Tensor | None
    _permutation: Tensor | None
    _scales: Tensor | None
    _offset: Tensor | None
    _down: Tensor | None
    _up: Tensor | None

    def __init__(self, quantized: QuantizedSite, clock: FlowClock) -> None:
        super().__init__()
        self.splits = quantized.splits
        self.in_features = quantized.in_features
        self.out_features = sum(quantized.splits)
        self._activations = quantized.activations
        times = quantized.activation_times
        self._times: list[float] | None = None if times is None else times.tolist()
        self._clock = clock
        weight = quantized.weight.dequantize()
        if quantized.output_rotation is not None:
            weight = quantized.output_rotation.undo(weight.t()).t().contiguous()
        transform, branch = quantized.transform, quantized.low_rank
        held = {
            "_weight": weight,
            "_bias": quantized.bias,
            "_matrix": None if transform is None else transform.matrix,
            "_permutation": None if transform is None else transform.permutation,
            "_scales": quantized.activation_scale,
            "_offset": quantized.offset,
            "_down": None if branch is None else branch.down,
            "_up": None if branch is None else branch.up,
        }
        for name, tensor in held.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], through integers and back."""
        rows = self.transform_input(x.to(torch.float32))
        scale = self.input_scale(rows)
        rounded = round_activations(rows, scale, self.activation_bits).mul_(scale)
        y = F.linear(rounded, self._weight, self._bias_now())
        if self._down is not None and self._up is not None:
            y = y + LowRankBranch(self._down, self._up).apply(x)
        return y.to(x.dtype)

    @property
    def activation_bits(self) -> int:
        """Width of the activation integers."""
        return self._activations.bits

    def transform_input(self, rows: Tensor) -> Tensor:
        """Rows [..., K] float32 → [..., K'], as they are rounded."""
        transform = None
        if self._matrix is not None:
            block = self._matrix.shape[-1]
            transform = BlockTransform(self._matrix, self._permutation, block, self.in_features)
        transformed = transform_rows(rows, transform)
        return transformed if self._offset is None else transformed - self._now(self._offset)

    def held_bytes(self) -> int:
        """Bytes of the dequantized weight and what goes with it."""
        return self._weight.nbytes + (0 if self._matrix is None else self._matrix.nbytes)

    def input_scale(self, transformed: Tensor) -> Tensor:
        """Activation scale of transformed rows: per token [..., 1], or static, [] or [K']."""
        if self._scales is None:
            return per_token_scale(transformed, self._activations.bits, self._activations.share)
        return self._now(self._scales)

    def _now(self, table: Tensor) -> Tensor:
        """What a table over the steps holds at this flow time."""
        assert self._times is not None
        time = self._clock.time
        if time is None and len(self._times) > 1:
            raise ValueError("per-step scales need the flow time: enter the clock for each step")
        return place(self._times, 1.0 if time is None else time).of(table)

    def _bias_now(self) -> Tensor | None:
        if self._bias is None or self._offset is None:
            return self._bias
        return self._now(self._bias)


class SimulatedEmbedding(nn.Module):
    """Token embedding that dequantizes the rows looked up."""

    _integers: Tensor
    _scale: Tensor

    def __init__(self, rows: QuantizedRows) -> None:
        super().__init__()
        self.register_buffer("_integers", rows.integers, persistent=False)
        self.register_buffer("_scale", rows.scale, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] → float32 [..., D]."""
        return scale_rows(self._integers[token_ids], self._scale[token_ids])


def install_site(policy: Policy, linears: Sequence[str], replacement: nn.Module) -> None:
    """Let ``replacement`` compute the linears of one site.

    The networks of this project know fused sites (``shared_input``); a user's module calls every
    linear by itself, through slots.
    """
    if isinstance(policy, TorchPolicy):
        fill_slots(policy.module, linears, replacement, policy.clock)
    else:
        install(policy.module, linears, replacement)


def install(module: nn.Module, linears: Sequence[str], replacement: nn.Module) -> None:
    """Put ``replacement`` in the place of a site's first linear and empty the other places."""
    first, *others = linears
    _set(module, first, replacement)
    for name in others:
        _set(module, name, None)


def _set(module: nn.Module, path: str, value: nn.Module | None) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
