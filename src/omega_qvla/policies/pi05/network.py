"""pi0.5 as a compact native module with openpi's state-dict keys.

The graph (Physical Intelligence's pi0.5; semantics after openpi's PyTorch port):

1. **Prefix.** Images and prompt through PaliGemma, once per observation
   (``paligemma/network.py``).
2. **Action expert.** A narrower Gemma, layer by layer beside the first one, reads ``horizon``
   action tokens that attend to each other and to the prefix's keys and values.  Its norms are
   adaptive: scale, shift and gate come from the flow time t through a sine-cosine embedding and a
   small MLP.  They depend on t alone, so a table of them is computed once per schedule.
3. **Flow matching.** Starting from noise x at t = 1, Euler steps x ← x - v(x, t)/steps lead to the
   normalized action chunk at t = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.layers.gemma import AdaptiveGemmaLayer
from omega_qvla.policies.layers.modules import time_embedding
from omega_qvla.policies.layers.norms import AdaptiveRMSNorm
from omega_qvla.policies.paligemma.names import EXPERT_LAYERS
from omega_qvla.policies.paligemma.network import (
    TIME_MAX_PERIOD,
    TIME_MIN_PERIOD,
    PaligemmaModule,
)
from omega_qvla.policies.pi05.config import Pi05Config

ADAPTIVE_NORM = f"{EXPERT_LAYERS}.0.input_layernorm.dense.weight"
"""A tensor that no other network on PaliGemma has."""


class Pi05Module(PaligemmaModule):
    """The network.  All methods accept leading batch dimensions."""

    config: Pi05Config

    def __init__(self, config: Pi05Config) -> None:
        expert, width = config.expert, config.expert.width
        super().__init__(
            config, lambda: AdaptiveGemmaLayer(expert), lambda: AdaptiveRMSNorm(width, width)
        )
        self.time_mlp_in: nn.Linear | None = nn.Linear(width, width)
        self.time_mlp_out: nn.Linear | None = nn.Linear(width, width)

    def adaptive_norms(self) -> list[AdaptiveRMSNorm]:
        """All adaptive norms, two per expert layer and the final one."""
        expert = self.paligemma_with_expert.gemma_expert.model
        return [norm for norm in expert.modules() if isinstance(norm, AdaptiveRMSNorm)]

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
        normed, _ = self.expert_norm(x, modulation[..., -1, :, :])
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


def remove_modulation(module: Pi05Module) -> None:
    """Take out the adaptive norms' dense layers and the time MLP, which a step table replaces."""
    for norm in module.adaptive_norms():
        norm.dense = None
    module.time_mlp_in = None
    module.time_mlp_out = None
