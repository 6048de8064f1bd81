"""Layers shared by the policies: norms, rotary attention with a KV cache, SigLIP.

Semantics follow the public openpi and transformers implementations (checked against them at a
shrunken size in ``tests/parity``); parameter names are the official state-dict keys.  Shapes:
``B`` batch (any leading dimensions), ``T`` tokens, ``D`` width, ``h`` heads, ``d`` head width.

* Gemma RMSNorm stores its gain as an offset: y = x / rms(x) · (1 + w).
* Adaptive RMSNorm (adaRMS) has no gain of its own; a dense layer turns the denoising-time
  embedding into (scale, shift, gate): y = x / rms(x) · (1 + scale) + shift, and the branch that
  follows is added to the residual stream multiplied by ``gate``.  Since (scale, shift, gate)
  depend on flow time alone they are computed outside the layer and passed in.
* Rotary embedding rotates the pairs (x_i, x_{i+d/2}) by position · θ^(-2i/d), θ = 10 000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import shared_input
from omega_qvla.policies.layers.elementwise import (
    TORCH,
    Elementwise,
    ElementwiseModule,
    Gate,
    RotaryTable,
)

KeyValue = tuple[Tensor, Tensor]
"""Rotated keys and values of one layer, each [B, kv_heads, T, d]."""


class VisionConfig(BaseModel):
    """SigLIP tower sizes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    width: int
    hidden: int
    heads: int
    depth: int
    image_size: int
    patch_size: int = 14

    @property
    def tokens_per_image(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Node(nn.Module):
    """A bare node of an official key tree."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


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


def rotary_table(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> RotaryTable:
    """Cosines and sines for positions [B, T], each [B, 1, T, head_dim/2] (the 1 is for heads)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = theta ** (-exponent / head_dim)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    return angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3)


def embedding(count: int, width: int) -> nn.Embedding:
    """An embedding table; on the meta device without the random start it could not have anyway.

    (Drawing it there would import PyTorch's compiler, which takes longer than loading a policy.)
    """
    table = torch.empty((count, width))
    return nn.Embedding(count, width, _weight=table if table.is_meta else table.normal_())


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
        past: KeyValue | Roomy | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x [B, T, D] → ([B, T, D], this call's own keys and values)."""
        q, own = self._project(x, rotary)
        return self.o_proj(attend(q, *_after(past, own), mask)), own

    def logits(
        self,
        x: Tensor,
        rotary: RotaryTable,
        past: KeyValue | Roomy | None = None,
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


class Roomy(NamedTuple):
    """A prefix's keys and values with room behind them, [B, kv_heads, P + T, d].

    What denoises asks the same prefix at every step, and only its own T rows change: they are
    written where the last step's were, and the prefix is not copied again.
    """

    keys: Tensor
    values: Tensor
    prefix: int

    @classmethod
    def behind(cls, past: KeyValue, tokens: int) -> Roomy:
        """Keys and values of a prefix, copied once, with room for so many tokens."""
        keys, values = (F.pad(one, (0, 0, 0, tokens)) for one in past)
        return cls(keys, values, past[0].shape[-2])

    def filled(self, own: KeyValue) -> KeyValue:
        """All keys and values, these behind the prefix; valid until the next call."""
        for whole, part in zip(self[:2], own, strict=True):
            whole[..., self.prefix :, :] = part
        return self.keys, self.values


def _after(past: KeyValue | Roomy | None, own: KeyValue) -> KeyValue:
    """Cached keys and values, then one's own."""
    if past is None:
        return own
    if isinstance(past, Roomy):
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


class SiglipAttention(nn.Module):
    """Plain multi-head attention with biases; the official name of its output is ``out_proj``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            split_heads(y, self.head_dim)
            for y in shared_input(x, self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v))


class SiglipMLP(ElementwiseModule):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.elementwise.activate("gelu_tanh", self.fc1(x)))


class SiglipLayer(nn.Module):
    """Pre-norm transformer layer of the vision tower."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, eps=1e-6)
        self.self_attn = SiglipAttention(width, heads)
        self.layer_norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = SiglipMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEmbeddings(nn.Module):
    """Non-overlapping patches, linearly embedded, plus learned positions."""

    def __init__(self, width: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = embedding((image_size // patch_size) ** 2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] → tokens [B, patches, D]."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class SiglipEncoder(nn.Module):
    """Holder of the layers, for the official key names."""

    def __init__(self, width: int, hidden: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(width, hidden, heads) for _ in range(depth))


class SiglipVisionModel(nn.Module):
    """SigLIP image tower: patches → transformer → layer norm; no pooling head."""

    def __init__(
        self, *, width: int, hidden: int, heads: int, depth: int, image_size: int, patch_size: int
    ) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(width, image_size, patch_size)
        self.encoder = SiglipEncoder(width, hidden, heads, depth)
        self.post_layernorm = LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)
