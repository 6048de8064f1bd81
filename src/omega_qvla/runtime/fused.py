"""What a policy on a GPU computes between its linears, one launch each.

Takes the place of ``policies.elementwise.TORCH`` in a policy that was loaded onto a GPU.  Four
launches of an adaptive norm become one; a gate, its activation and its product become the end of
the multiplication that made them, where the two linears are one fused module of integers, and one
launch elsewhere; a gated residual is one operation of PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.policies.elementwise import RMS_EPS, Elementwise, Gate
from omega_qvla.runtime.kernels.triton_elementwise import gated_product, normalize
from omega_qvla.runtime.linear import QuantizedLinear


class FusedElementwise(Elementwise):
    """By the GPU programs; see ``Elementwise`` for what each computes."""

    def rms_norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return normalize(x, gain, None, eps=RMS_EPS, centred=False)

    def adaptive_rms_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return normalize(x, scale, shift, eps=RMS_EPS, centred=False)

    def adaptive_layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        return normalize(x, scale, shift, eps=eps, centred=True)

    def add_gated(self, stream: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(stream, gate, branch)

    def gated_product(self, kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
        return gated_product(kind, gate, up)

    def gated_linears(
        self, kind: Gate, x: Tensor, gate_proj: nn.Module, up_proj: nn.Module | None
    ) -> Tensor:
        if up_proj is None and isinstance(gate_proj, QuantizedLinear) and gate_proj.can_gate():
            return gate_proj.gated(x, kind)
        return super().gated_linears(kind, x, gate_proj, up_proj)
