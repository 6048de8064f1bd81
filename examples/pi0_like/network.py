"""A small network like pi0's: Gemma over images and prompt, a second one that denoises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache, rotary_table
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.gemma import GemmaLayer, KeyValueGemmaLayer
from omega_qvla.policies.layers.modules import embedding, time_embedding
from omega_qvla.policies.layers.norms import RMSNorm
from omega_qvla.policies.layers.siglip import SiglipVisionModel
from omega_qvla.policies.pi0_like.config import Pi0LikeConfig


class Pi0LikeModule(nn.Module):
    """The network.  Shapes: B batch, P prefix, H horizon, D width of the expert."""

    def __init__(self, config: Pi0LikeConfig) -> None:
        super().__init__()
        self.config = config
        backbone, width = config.backbone, config.expert.width
        self.vision = SiglipVisionModel(**config.vision.model_dump())
        self.projector = nn.Linear(config.vision.width, backbone.width)
        self.embed_tokens = embedding(config.vocabulary, backbone.width)
        layers = [GemmaLayer(backbone) for _ in range(config.depth - 1)]
        self.backbone = nn.ModuleList([*layers, KeyValueGemmaLayer(backbone)])
        self.expert = nn.ModuleList(GemmaLayer(config.expert) for _ in range(config.depth))
        self.expert_norm = RMSNorm(width)
        self.state_proj = nn.Linear(config.state_dim, width)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels [B, V, 3, S, S] → tokens [B, V·patches, width of the backbone]."""
        tokens = self.projector(self.vision(pixels.flatten(0, 1)))
        return tokens.unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def embed_prefix(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Image tokens, then those of the prompt [B, T], scaled as Gemma does → [B, P, …]."""
        text = self.embed_tokens(token_ids) * math.sqrt(self.config.backbone.width)
        return torch.cat((images, text), dim=1)

    def prefix_rotary(self, prefix: Tensor) -> RotaryTable:
        positions = torch.arange(prefix.shape[1], device=prefix.device).unsqueeze(0)
        return rotary_table(positions, self.config.backbone.head_dim)

    def prefill(self, prefix: Tensor) -> list[KeyValue]:
        """The prefix's keys and values, layer by layer."""
        rotary, cache = self.prefix_rotary(prefix), []
        for layer in self.backbone:
            prefix, kv = layer(prefix, rotary)
            cache.append(kv)
        return cache

    def suffix(self, prefix: int) -> tuple[RotaryTable, Tensor]:
        """Positions of state and actions behind a prefix, and what they see: [1, 1, 1+H, P+1+H].

        The state does not see the actions.
        """
        tokens, device = 1 + self.config.horizon, self.state_proj.weight.device
        positions = prefix + torch.arange(tokens, device=device).unsqueeze(0)
        seen = torch.ones(tokens, prefix + tokens, dtype=torch.bool, device=device)
        seen[0, prefix + 1 :] = False
        return rotary_table(positions, self.config.expert.head_dim), seen[None, None]

    def time_code(self, times: Tensor) -> Tensor:
        """Flow times [S] → [S, D]."""
        return time_embedding(times, self.config.expert.width, 4e-3, 4.0).to(torch.float32)

    def embed_step(self, x_t: Tensor, code: Tensor, state: Tensor) -> Tensor:
        """Noisy actions [B, H, A], a time code [1, D] and the state → tokens [B, 1+H, D]."""
        actions = self.action_in_proj(x_t)
        joined = torch.cat((actions, code.unsqueeze(1).expand_as(actions)), dim=-1)
        actions = self.action_time_mlp_out(nn.functional.silu(self.action_time_mlp_in(joined)))
        return torch.cat((self.state_proj(state).unsqueeze(1), actions), dim=1)

    def read_out(self, x: Tensor) -> Tensor:
        """Tokens [B, 1+H, D] → velocity of the actions [B, H, A]."""
        return self.action_out_proj(self.expert_norm(x[:, 1:]))

    def velocity(
        self,
        x_t: Tensor,
        code: Tensor,
        state: Tensor,
        cache: Sequence[KeyValue | PreallocatedKVCache],
        suffix: tuple[RotaryTable, Tensor],
    ) -> Tensor:
        """The learned velocity, noise - actions, [B, H, A]."""
        x = self.embed_step(x_t, code, state)
        for layer, past in zip(self.expert, cache, strict=True):
            x, _ = layer(x, *suffix, past)
        return self.read_out(x)
