"""Layers of Qwen3, with transformers' parameter names (checked in ``tests/parity``).

Its RMSNorm has an ordinary gain, y = x / rms(x) · w.  Queries and keys are normalized per head
before they are rotated, and attention is causal.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import attend, split_heads
from omega_qvla.policies.layers.elementwise import (
    ElementwiseModule,
    Gate,
    RotaryTable,
)
from omega_qvla.policies.layers.gemma import GatedMLP
from omega_qvla.policies.layers.modules import shared_input


class QwenConfig(BaseModel):
    """Sizes of the language model; only the layers that are used count."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    depth: int
    rotary_period: float = 1_000_000.0


class QwenRMSNorm(ElementwiseModule):
    """RMSNorm with an ordinary gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.elementwise.rms_norm(x, self.weight, 0.0)


class QwenMLP(GatedMLP):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    gate: Gate = "silu"


class QwenAttention(ElementwiseModule):
    """Causal grouped-query attention with normalized queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = QwenRMSNorm(head_dim)
        self.k_norm = QwenRMSNorm(head_dim)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """x [B, T, D] → [B, T, D]; a token attends to itself and to those before it."""
        q, k, v = (
            split_heads(y, self.head_dim)
            for y in shared_input(x, self.q_proj, self.k_proj, self.v_proj)
        )
        rotate = self.elementwise.rotate
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        causal = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
        return self.o_proj(attend(q, k, v, causal))


class QwenLayer(nn.Module):
    """Pre-norm Qwen3 layer."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.input_layernorm = QwenRMSNorm(width)
        self.self_attn = QwenAttention(width, heads, kv_heads, head_dim)
        self.post_attention_layernorm = QwenRMSNorm(width)
        self.mlp = QwenMLP(width, hidden)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))
