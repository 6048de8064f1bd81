"""SigLIP and Gemma over images and prompt, and the keys of what stands beside them.

Every camera image goes through SigLIP and a linear projector; the prompt goes through the token
embedding times √width.  Images first, then text, all attending to each other, through a Gemma
transformer.  Only each layer's rotated keys and values are needed afterwards, so they are computed
once per observation, and the last layer consists of nothing else.

What a checkpoint holds but inference never reads is not allocated: both language-model heads, and
everything behind the keys and values of the backbone's last layer (``dropped_shapes``).  Masked
cameras and prompt padding are dropped rather than masked: positions are a cumulative sum over the
padding mask, so the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import KeyValue, rotary_table
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.gemma import GemmaLayer, KeyValueGemmaLayer
from omega_qvla.policies.layers.modules import Node, embedding
from omega_qvla.policies.layers.siglip import SiglipVisionModel
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.names import BACKBONE_LAYERS, EXPERT_HEAD, HEAD, LANGUAGE

TIME_MIN_PERIOD, TIME_MAX_PERIOD = 4e-3, 4.0
"""Of the sines and cosines that flow time enters by."""


class PaligemmaModule(nn.Module):
    """PaliGemma beside an action expert: openpi's keys, no dead weights.

    All methods accept leading batch dimensions.

    Args:
        config: of the policy.
        expert_layer: makes one layer of the expert.
        expert_norm: makes the norm behind its layers.
    """

    def __init__(
        self,
        config: PaligemmaConfig,
        expert_layer: Callable[[], nn.Module],
        expert_norm: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        vision, expert = config.vision, config.expert
        root, paligemma, model, language = Node(), Node(), Node(), Node()
        model.vision_tower = Node()
        model.vision_tower.vision_model = SiglipVisionModel(**vision.model_dump())
        model.multi_modal_projector = Node()
        model.multi_modal_projector.linear = nn.Linear(vision.width, config.backbone.width)
        language.embed_tokens = embedding(config.vocabulary, config.backbone.width)
        language.layers = nn.ModuleList(
            [GemmaLayer(config.backbone) for _ in range(config.depth - 1)]
            + [KeyValueGemmaLayer(config.backbone)]
        )
        model.language_model = language
        paligemma.model = model
        root.paligemma = paligemma
        root.gemma_expert = Node()
        root.gemma_expert.model = Node()
        root.gemma_expert.model.layers = nn.ModuleList(expert_layer() for _ in range(config.depth))
        root.gemma_expert.model.norm = expert_norm()
        self.paligemma_with_expert = root
        self.action_in_proj = nn.Linear(config.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.action_dim)

    @property
    def vision_model(self) -> SiglipVisionModel:
        return self.paligemma_with_expert.paligemma.model.vision_tower.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.paligemma_with_expert.paligemma.model.multi_modal_projector.linear

    @property
    def embed_tokens(self) -> nn.Module:
        return self.paligemma_with_expert.paligemma.model.language_model.embed_tokens

    @property
    def backbone_layers(self) -> nn.ModuleList:
        return self.paligemma_with_expert.paligemma.model.language_model.layers

    @property
    def expert_layers(self) -> nn.ModuleList:
        return self.paligemma_with_expert.gemma_expert.model.layers

    @property
    def expert_norm(self) -> nn.Module:
        return self.paligemma_with_expert.gemma_expert.model.norm

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels [B, V, 3, S, S] in [-1, 1] → tokens [B, V·patches, D]."""
        batch, views = pixels.shape[:2]
        tokens = self.projector(self.vision_model(pixels.flatten(0, 1)))
        return tokens.unflatten(0, (batch, views)).flatten(1, 2)

    def embed_text(self, token_ids: Tensor) -> Tensor:
        """Token ids [B, T] → [B, T, D], scaled by √D as Gemma does."""
        return self.embed_tokens(token_ids) * math.sqrt(self.config.backbone.width)

    def embed_prefix(self, pixels: Tensor, token_ids: Tensor) -> Tensor:
        """Images then text, [B, V·patches + T, D]."""
        return torch.cat((self.embed_images(pixels), self.embed_text(token_ids)), dim=1)

    def prefix_rotary(self, positions: Tensor) -> RotaryTable:
        """Rotary table of positions [B, T]."""
        return rotary_table(positions, self.config.backbone.head_dim)

    def prefill(
        self, prefix: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> tuple[list[KeyValue], Tensor]:
        """Run the backbone over the prefix.

        Args:
            prefix: [B, P, D] embedded tokens.
            positions: [B, P] (or [1, P]) positions, the cumulative sum of the padding mask.
            mask: [B, 1, 1 or P, P] bool, True where a key may be seen; None without padding.

        Returns:
            Keys and values per layer, and the residual stream [B, P, D] before the last layer.
        """
        rotary = self.prefix_rotary(positions)
        cache: list[KeyValue] = []
        for layer in self.backbone_layers:
            prefix, kv = layer(prefix, rotary, mask)
            cache.append(kv)
        return cache, prefix

    def prefill_observation(self, images: Tensor, token_ids: Tensor) -> tuple[list[KeyValue], int]:
        """Keys and values of image tokens [B, V·patches, D] and a prompt [B, T], and their length.

        Nothing is padded: positions count up.
        """
        prefix = torch.cat((images, self.embed_text(token_ids)), dim=1)
        length = prefix.shape[1]
        positions = torch.arange(length, device=prefix.device).unsqueeze(0)
        return self.prefill(prefix, positions)[0], length

    def suffix_rotary(self, offset: Tensor | int) -> RotaryTable:
        """Rotary table of the action tokens; ``offset`` [B, 1] or int counts those before them."""
        positions = torch.arange(self.config.horizon, device=self.action_in_proj.weight.device)
        positions = positions.unsqueeze(0) + offset
        return rotary_table(positions, self.config.expert.head_dim)


def dropped_shapes(config: PaligemmaConfig) -> dict[str, tuple[int, ...]]:
    """Official checkpoint keys that inference never reads and the module does not allocate."""
    backbone, expert = config.backbone, config.expert
    last = f"{BACKBONE_LAYERS}.{config.depth - 1}"
    query = backbone.heads * backbone.head_dim
    return {
        f"{HEAD}.weight": (config.vocabulary, backbone.width),
        f"{EXPERT_HEAD}.weight": (config.vocabulary, expert.width),
        f"{LANGUAGE}.norm.weight": (backbone.width,),
        f"{last}.post_attention_layernorm.weight": (backbone.width,),
        f"{last}.self_attn.q_proj.weight": (query, backbone.width),
        f"{last}.self_attn.o_proj.weight": (backbone.width, query),
        f"{last}.mlp.gate_proj.weight": (backbone.hidden, backbone.width),
        f"{last}.mlp.up_proj.weight": (backbone.hidden, backbone.width),
        f"{last}.mlp.down_proj.weight": (backbone.width, backbone.hidden),
    }


def dropped_parameters(config: PaligemmaConfig) -> int:
    """Parameters of a complete official checkpoint that the module does not allocate.

    The backbone's language-model head is not counted: it is tied to the embedding.
    """
    shapes = dropped_shapes(config)
    del shapes[f"{HEAD}.weight"]
    return sum(map(math.prod, shapes.values()))
