"""Norms.

* Gemma's RMSNorm stores its gain as an offset: y = x / rms(x) · (1 + w).
* Adaptive RMSNorm (adaRMS) has no gain of its own; a dense layer turns the embedding of the flow
  time into (scale, shift, gate): y = x / rms(x) · (1 + scale) + shift, and the branch that follows
  is added to the residual stream multiplied by ``gate``.  Since (scale, shift, gate) depend on flow
  time alone they are computed outside the layer and passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.elementwise import (
    TORCH,
    Elementwise,
    ElementwiseModule,
)


class RMSNorm(ElementwiseModule):
    """Gemma's RMSNorm, gain stored as an offset from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.elementwise.rms_norm(x, self.weight, 1.0)


class LayerNorm(nn.LayerNorm, ElementwiseModule):
    """Layer norm with gain and bias."""

    def forward(self, input: Tensor) -> Tensor:
        return self.elementwise.layer_norm(input, self.eps, self.weight, self.bias)


class AdaptiveRMSNorm(ElementwiseModule):
    """RMSNorm whose scale, shift and gate come from the denoising time (adaRMS)."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.dense: nn.Linear | None = nn.Linear(condition_width, 3 * width)
        nn.init.zeros_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def modulation(self, condition: Tensor) -> Tensor:
        """Condition [B, C] → stacked (scale, shift, gate), [B, 3, D]."""
        if self.dense is None:
            raise PolicyError("this adaptive norm was replaced by a step table")
        return self.dense(condition).unflatten(-1, (3, -1))

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize x [B, T, D] with modulation [B, 3, D]; return (normed, gate [B, 1, D])."""
        return adaptive_rms_norm(x, modulation, self.elementwise)


def adaptive_rms_norm(
    x: Tensor, modulation: Tensor, elementwise: Elementwise = TORCH
) -> tuple[Tensor, Tensor]:
    """Normalize x [B, T, D] with modulation [B, 3, D]; return (normed, gate [B, 1, D])."""
    scale, shift, gate = modulation.unsqueeze(-3).unbind(-2)
    return elementwise.adaptive_rms_norm(x, scale, shift), gate
