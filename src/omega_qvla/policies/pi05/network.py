"""pi0.5 as a compact native module with openpi's state-dict keys.

The graph (Physical Intelligence's pi0.5; semantics after openpi's PyTorch port):

1. **Prefix.** Every camera image goes through SigLIP and a linear projector; the prompt goes
   through the token embedding times √width.  Images first, then text, all attending to each other,
   through a Gemma transformer.  Only each layer's rotated keys and values are needed afterwards,
   so they are computed once per observation, and the last layer consists of nothing else.
2. **Action expert.** A narrower Gemma, layer by layer beside the first one, reads ``horizon``
   action tokens that attend to each other and to the prefix's keys and values.  Its norms are
   adaptive: scale, shift and gate come from the flow time t through a sine-cosine embedding and a
   small MLP.  They depend on t alone, so a table of them is computed once per schedule.
3. **Flow matching.** Starting from noise x at t = 1, Euler steps x ← x - v(x, t)/steps lead to the
   normalized action chunk at t = 0.

What a checkpoint holds but inference never reads is not allocated here: both language-model heads,
and everything behind the keys and values of the backbone's last layer (``dropped_shapes``).
Masked cameras and prompt padding are dropped rather than masked: positions are a cumulative sum
over the padding mask, so the result is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import (
    KeyValue,
    PreallocatedKVCache,
    rotary_table,
)
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.layers.gemma import AdaptiveGemmaLayer, GemmaLayer, KeyValueGemmaLayer
from omega_qvla.policies.layers.modules import Node, embedding, time_embedding
from omega_qvla.policies.layers.norms import AdaptiveRMSNorm
from omega_qvla.policies.layers.siglip import SiglipVisionModel
from omega_qvla.policies.pi05.config import Pi05Config

TIME_MIN_PERIOD, TIME_MAX_PERIOD = 4e-3, 4.0


class Pi05Module(nn.Module):
    """The network: openpi's keys, no dead weights.  All methods accept leading batch dimensions."""

    def __init__(self, config: Pi05Config) -> None:
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
        root.gemma_expert.model.layers = nn.ModuleList(
            AdaptiveGemmaLayer(expert) for _ in range(config.depth)
        )
        root.gemma_expert.model.norm = AdaptiveRMSNorm(expert.width, expert.width)
        self.paligemma_with_expert = root
        self.action_in_proj = nn.Linear(config.action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.action_dim)
        self.time_mlp_in: nn.Linear | None = nn.Linear(expert.width, expert.width)
        self.time_mlp_out: nn.Linear | None = nn.Linear(expert.width, expert.width)

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

    def adaptive_norms(self) -> list[AdaptiveRMSNorm]:
        """All adaptive norms, two per expert layer and the final one."""
        expert = self.paligemma_with_expert.gemma_expert.model
        return [norm for norm in expert.modules() if isinstance(norm, AdaptiveRMSNorm)]

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

    def step_modulation(self, times: Tensor) -> Tensor:
        """Adaptive-norm modulation at flow times [B] → [B, norms, 3, D].

        Norm 2·i is layer i's attention norm, 2·i + 1 its MLP norm, the last one the final norm.

        Raises:
            PolicyError: the layers that compute it were removed (``remove_modulation``).
        """
        if self.time_mlp_in is None or self.time_mlp_out is None:
            raise PolicyError("this network's adaptive norms were replaced by a step table")
        width = self.config.expert.width
        embedding = time_embedding(times, width, TIME_MIN_PERIOD, TIME_MAX_PERIOD)
        embedding = embedding.to(self.time_mlp_in.weight)
        hidden = nn.functional.silu(self.time_mlp_in(embedding))
        condition = nn.functional.silu(self.time_mlp_out(hidden))
        norms = self.adaptive_norms()
        return torch.stack([norm.modulation(condition) for norm in norms], dim=-3)

    def suffix_rotary(self, offset: Tensor | int) -> RotaryTable:
        """Rotary table of the action tokens; ``offset`` [B, 1] or int is the prefix length."""
        positions = torch.arange(self.config.horizon, device=self.action_in_proj.weight.device)
        positions = positions.unsqueeze(0) + offset
        return rotary_table(positions, self.config.expert.head_dim)

    def velocity(
        self,
        x_t: Tensor,
        modulation: Tensor,
        cache: Sequence[KeyValue | PreallocatedKVCache],
        rotary: RotaryTable,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The learned velocity at one flow time.

        Args:
            x_t: [B, horizon, action_dim] noisy normalized actions.
            modulation: [B, norms, 3, D] from ``step_modulation``.
            cache: the prefix's keys and values per layer.
            rotary: from ``suffix_rotary``.
            mask: [B, 1, 1 or H, P + H] bool, True where a key may be seen.

        Returns:
            [B, horizon, action_dim] velocity (noise - actions).
        """
        x = self.action_in_proj(x_t)
        for i, (layer, kv) in enumerate(zip(self.expert_layers, cache, strict=True)):
            x = layer(x, modulation[..., 2 * i : 2 * i + 2, :, :], rotary, kv, mask)
        return self.read_out(x, modulation)

    def read_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Final norm and projection, [B, horizon, D] → [B, horizon, action_dim]."""
        norm = self.paligemma_with_expert.gemma_expert.model.norm
        normed, _ = norm(x, modulation[..., -1, :, :])
        return self.action_out_proj(normed)


def sample_chunk(
    module: Pi05Module,
    cache: Sequence[KeyValue],
    prefix_length: int,
    noise: Tensor,
    modulation: Tensor,
    clock: FlowClock,
    guidance: Guidance | None = None,
) -> Tensor:
    """Integrate the flow from noise to a normalized action chunk.

    Args:
        cache: keys and values of the prefix, batch B.
        noise: [B, horizon, action_dim] at t = 1.
        modulation: [steps, norms, 3, D], one row per Euler step.
        clock: entered once per step.
        guidance: what the chunk continues, or None.
    """
    rotary = module.suffix_rotary(prefix_length)
    preallocated = [PreallocatedKVCache.after(kv, noise.shape[-2]) for kv in cache]

    def velocity(x: Tensor, step: int) -> Tensor:
        return module.velocity(x, modulation[step : step + 1], preallocated, rotary)

    return integrate(velocity, noise, modulation.shape[0], clock, guidance)


def dropped_shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """Official checkpoint keys that inference never reads and this module does not allocate."""
    backbone, expert = config.backbone, config.expert
    language = "paligemma_with_expert.paligemma.model.language_model"
    last = f"{language}.layers.{config.depth - 1}"
    query = backbone.heads * backbone.head_dim
    return {
        "paligemma_with_expert.paligemma.lm_head.weight": (config.vocabulary, backbone.width),
        "paligemma_with_expert.gemma_expert.lm_head.weight": (config.vocabulary, expert.width),
        f"{language}.norm.weight": (backbone.width,),
        f"{last}.post_attention_layernorm.weight": (backbone.width,),
        f"{last}.self_attn.q_proj.weight": (query, backbone.width),
        f"{last}.self_attn.o_proj.weight": (backbone.width, query),
        f"{last}.mlp.gate_proj.weight": (backbone.hidden, backbone.width),
        f"{last}.mlp.up_proj.weight": (backbone.hidden, backbone.width),
        f"{last}.mlp.down_proj.weight": (backbone.width, backbone.hidden),
    }


def dropped_parameters(config: Pi05Config) -> int:
    """Parameters of a complete official checkpoint that this module does not allocate.

    The backbone's language-model head is not counted: it is tied to the embedding.
    """
    shapes = dropped_shapes(config)
    del shapes["paligemma_with_expert.paligemma.lm_head.weight"]
    return sum(map(math.prod, shapes.values()))


def remove_modulation(module: Pi05Module) -> None:
    """Take out the adaptive norms' dense layers and the time MLP, which a step table replaces."""
    for norm in module.adaptive_norms():
        norm.dense = None
    module.time_mlp_in = None
    module.time_mlp_out = None
