"""Layers of Gemma, with transformers' parameter names (checked in ``tests/parity``).

``GemmaLayer`` is Gemma's own.  ``AdaptiveGemmaLayer`` has adaptive norms in the place of its two
norms and gates in front of its two residual sums; pi0.5's action expert is made of it.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import (
    KeyValue,
    KeyValueProjection,
    PreallocatedKVCache,
    RotaryAttention,
)
from omega_qvla.policies.layers.elementwise import (
    ElementwiseModule,
    Gate,
    RotaryTable,
)
from omega_qvla.policies.layers.norms import AdaptiveRMSNorm, RMSNorm


class GatedMLP(ElementwiseModule):
    """GeGLU: down(gelu_tanh(gate(x)) · up(x))."""

    gate: Gate = "gelu_tanh"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.elementwise.gated_linears(self.gate, x, self.gate_proj, self.up_proj)
        return self.down_proj(hidden)


class GemmaConfig(BaseModel):
    """Sizes of one Gemma transformer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int
    hidden: int
    heads: int
    kv_heads: int = 1
    head_dim: int


class _Layer(ElementwiseModule):
    """What both kinds of layer hold."""

    def __init__(self, config: GemmaConfig, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = norm(config.width)
        self.self_attn = RotaryAttention(
            config.width, config.heads, config.kv_heads, config.head_dim
        )
        self.post_attention_layernorm = norm(config.width)
        self.mlp = GatedMLP(config.width, config.hidden)


class GemmaLayer(_Layer):
    """Pre-norm Gemma layer."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config, RMSNorm)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable,
        mask: Tensor | None = None,
        past: KeyValue | PreallocatedKVCache | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [B, T, D] → ([B, T, D], this layer's own keys and values)."""
        attended, kv = self.self_attn(self.input_layernorm(x), rotary, past, mask)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class KeyValueGemmaLayer(nn.Module):
    """A last layer of which nothing but its keys and values is read."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = KeyValueProjection(config.width, config.kv_heads, config.head_dim)

    def forward(
        self, x: Tensor, rotary: RotaryTable, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        return x, self.self_attn(self.input_layernorm(x), rotary)


class AdaptiveGemmaLayer(_Layer):
    """Gemma layer with adaptive norms and gated residuals, attending to a prefix."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config, lambda width: AdaptiveRMSNorm(width, width))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: RotaryTable,
        past: KeyValue | PreallocatedKVCache,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, H, D], modulation [B, 2, 3, D] → [B, H, D]."""
        attention_modulation, mlp_modulation = modulation.unbind(-3)
        normed, gate = self.input_layernorm(x, attention_modulation)
        attended, _ = self.self_attn(normed, rotary, past, mask)
        x = self.elementwise.add_gated(x, gate, attended)
        normed, gate = self.post_attention_layernorm(x, mlp_modulation)
        return self.elementwise.add_gated(x, gate, self.mlp(normed))
