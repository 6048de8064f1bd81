"""Attention, with a cache of keys and values and rotary positions.

Shapes: ``B`` batch (any leading dimensions), ``T`` tokens, ``D`` width, ``h`` heads, ``d`` head
width.  Rotary embedding rotates the pairs (x_i, x_{i+d/2}) by position · θ^(-2i/d), θ = 10 000
unless a network says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.policies.layers.elementwise import (
    ElementwiseModule,
    RotaryTable,
)
from omega_qvla.policies.layers.modules import shared_input

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, each [B, kv_heads, T, d]."""


def rotary_table(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> RotaryTable:
    """Cosines and sines for positions [B, T], each [B, 1, T, head_dim/2] (the 1 is for heads)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-exponent / head_dim)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, h·d] → [B, h, T, d]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, h, T, d] over [B, kv_heads, S, d] → [B, T, h·d]; mask: True may be seen.

    Heads that share keys become further query rows of one head: nothing is copied per head.
    """
    heads, tokens = query.shape[-3:-1]
    kv_heads = key.shape[-3]
    groups = heads // kv_heads
    if groups > 1:
        query = query.reshape(*query.shape[:-3], kv_heads, groups * tokens, query.shape[-1])
        if mask is not None and mask.shape[-2] == tokens and tokens > 1:
            mask = torch.cat([mask] * groups, dim=-2)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if groups > 1:
        out = out.reshape(*out.shape[:-3], heads, tokens, out.shape[-1])
    return out.transpose(-3, -2).flatten(-2)


def attention_logits(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """What ``attend`` takes the softmax of, [B, h, T, S]; -inf where the mask hides."""
    keys = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = query @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


class RotaryAttention(ElementwiseModule):
    """Grouped-query attention with rotary positions and an optional cached prefix."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable,
        past: KeyValue | PreallocatedKVCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [B, T, D] → ([B, T, D], this call's own keys and values)."""
        q, own = self._project(x, rotary)
        return self.o_proj(attend(q, *_after(past, own), mask)), own

    def logits(
        self,
        x: Tensor,
        rotary: RotaryTable,
        past: KeyValue | PreallocatedKVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the softmax of ``forward`` sees, [B, h, T, S]."""
        q, own = self._project(x, rotary)
        return attention_logits(q, _after(past, own)[0], mask)

    def _project(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, KeyValue]:
        """Queries, and keys and values."""
        q, k, v = (
            split_heads(y, self.head_dim)
            for y in shared_input(x, self.q_proj, self.k_proj, self.v_proj)
        )
        rotate = self.elementwise.rotate
        return rotate(q, rotary), (rotate(k, rotary), v)


class PreallocatedKVCache(NamedTuple):
    """A prefix's keys and values with room behind them, [B, kv_heads, P + T, d].

    What denoises asks the same prefix at every step, and only its own T rows change: they are
    written where the last step's were, and the prefix is not copied again.
    """

    keys: Tensor
    values: Tensor
    prefix: int

    @classmethod
    def after(cls, past: KeyValue, tokens: int) -> PreallocatedKVCache:
        """Keys and values of a prefix, copied once, with room for so many tokens."""
        keys, values = (F.pad(one, (0, 0, 0, tokens)) for one in past)
        return cls(keys, values, past[0].shape[-2])

    def filled(self, own: KeyValue) -> KeyValue:
        """All keys and values, these behind the prefix; valid until the next call."""
        for whole, part in zip(self[:2], own, strict=True):
            whole[..., self.prefix :, :] = part
        return self.keys, self.values


def _after(past: KeyValue | PreallocatedKVCache | None, own: KeyValue) -> KeyValue:
    """Cached keys and values, then one's own."""
    if past is None:
        return own
    if isinstance(past, PreallocatedKVCache):
        return past.filled(own)
    return torch.cat((past[0], own[0]), dim=-2), torch.cat((past[1], own[1]), dim=-2)


class KeyValueProjection(ElementwiseModule):
    """Only the keys and values of an attention layer whose output nobody reads."""

    def __init__(self, width: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTable) -> KeyValue:
        k, v = (split_heads(y, self.head_dim) for y in shared_input(x, self.k_proj, self.v_proj))
        return self.elementwise.rotate(k, rotary), v
