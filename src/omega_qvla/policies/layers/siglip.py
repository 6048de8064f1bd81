"""SigLIP's image tower, with transformers' parameter names (checked in ``tests/parity``)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import attend, split_heads
from omega_qvla.policies.layers.elementwise import (
    ElementwiseModule,
)
from omega_qvla.policies.layers.modules import embedding, shared_input
from omega_qvla.policies.layers.norms import LayerNorm


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
