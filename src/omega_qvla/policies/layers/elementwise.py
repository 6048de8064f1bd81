"""What layers compute between their linears: a method for each thing a runtime may do at once.

PyTorch takes a pass over memory per operation, and on a GPU a program: a norm with its modulation
is four where one would do, thousands of times a chunk.  So layers do not spell these out but ask
the ``Elementwise`` they hold, which is ``TORCH`` until a runtime puts its own in its place
(``use_elementwise``).  What is here is the definition: another one may round differently, not
compute something else.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.policies.layers.modules import shared_input

RMS_EPS = 1e-6
Gate = Literal["gelu_tanh", "silu"]
"""The nonlinearity of a gated product."""
RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each [B or 1, 1, T, d/2]."""


class Elementwise:
    """The operations, by PyTorch.

    Shapes: x [..., T, D]; scales, shifts and gates [..., 1, D], one row for all tokens of a chunk.
    """

    def rms_norm(self, x: Tensor, gain: Tensor, base: float) -> Tensor:
        """x / rms(x) · (base + gain), gain [D]; Gemma's base is 1, Qwen's 0."""
        return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS) * (base + gain)

    def adaptive_rms_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x / rms(x) · (1 + scale) + shift."""
        return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS) * (1.0 + scale) + shift

    def adaptive_layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        """(x - mean(x)) / deviation(x) · (1 + scale) + shift."""
        return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1.0 + scale) + shift

    def layer_norm(
        self, x: Tensor, eps: float, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """(x - mean(x)) / deviation(x) · gain + bias, both [D] or both absent."""
        return F.layer_norm(x, (x.shape[-1],), gain, bias, eps)

    def add_gated(self, stream: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        """stream + gate · branch, the residual of an adaptive layer."""
        return stream + gate * branch

    def activate(self, kind: Gate, x: Tensor) -> Tensor:
        """activation(x)."""
        return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh")

    def gated_product(self, kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) · up."""
        return self.activate(kind, gate) * up

    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Rotary embedding of x [B, h, T, d]."""
        cos, sin = table
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def gated_linears(
        self, kind: Gate, x: Tensor, gate_proj: nn.Module, up_proj: nn.Module | None
    ) -> Tensor:
        """activation(gate_proj(x)) · up_proj(x); the two may be one fused module."""
        gate, up = shared_input(x, gate_proj, up_proj)
        return self.gated_product(kind, gate, up)


TORCH = Elementwise()


class ElementwiseModule(nn.Module):
    """A layer that asks its ``elementwise``; no parameters or buffers of its own."""

    elementwise: Elementwise = TORCH


def use_elementwise(module: nn.Module, elementwise: Elementwise) -> None:
    """Let every layer inside a module ask this one."""
    for child in module.modules():
        if isinstance(child, ElementwiseModule):
            child.elementwise = elementwise
