"""Llama, with transformers' parameter names (checked in ``tests/parity``).

Pre-norm layers with an ordinary RMSNorm, rotary grouped-query attention and SwiGLU; the output head
is the token embedding again.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import RotaryAttention
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.modules import embedding
from omega_qvla.policies.layers.qwen3 import QwenMLP


class LlamaConfig(BaseModel):
    """Sizes of the language model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    vocabulary: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    depth: int
    rotary_period: float
    norm_eps: float


class LlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = RotaryAttention(
            config.width, config.heads, config.kv_heads, config.head_dim
        )
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = QwenMLP(config.width, config.hidden)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        """x [B, T, D] → [B, T, D]; a token attends to itself and to those before it."""
        causal = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
        attended, _ = self.self_attn(self.input_layernorm(x), rotary, mask=causal)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Token ids to the hidden states that ``logits`` reads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] → [..., vocabulary]."""
        return hidden @ self.embed_tokens.weight.t()
