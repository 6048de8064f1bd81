"""pi0 as a compact native module with openpi's state-dict keys.

The graph (Physical Intelligence's pi0, arXiv 2410.24164; semantics after openpi's PyTorch port):

1. **Prefix.** Images and prompt through PaliGemma, once per observation
   (``paligemma/network.py``).
2. **State.** The robot's state is one token of the action expert, a narrower Gemma layer by layer
   beside the first one.  It sees the prefix and itself, but no action, and time does not enter it:
   its keys and values stand behind the prefix's, computed once per observation as well.
3. **Actions.** ``horizon`` tokens that see the prefix, the state and each other.  Flow time t
   enters beside every action, through a sine-cosine embedding and a small MLP; norms are plain.
4. **Flow matching.** Starting from noise x at t = 1, Euler steps x ← x - v(x, t)/steps lead to the
   normalized action chunk at t = 0.

The original computes the state's token again in every step, and masks it from the actions; the
numbers are the same.  In a quantized policy the expert has scales and offsets for each step; the
state is read with those of the first, t = 1 (``STATE_TIME``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache, rotary_table
from omega_qvla.policies.layers.elementwise import RotaryTable
from omega_qvla.policies.layers.gemma import GemmaLayer
from omega_qvla.policies.layers.modules import time_embedding
from omega_qvla.policies.layers.norms import RMSNorm
from omega_qvla.policies.paligemma.network import (
    TIME_MAX_PERIOD,
    TIME_MIN_PERIOD,
    PaligemmaModule,
)
from omega_qvla.policies.pi0.config import Pi0Config

STATE_TIME = 1.0
"""Flow time of the step that the state's token is computed in."""


class Pi0Module(PaligemmaModule):
    """The network.  All methods accept leading batch dimensions."""

    config: Pi0Config

    def __init__(self, config: Pi0Config) -> None:
        expert, width = config.expert, config.expert.width
        super().__init__(config, lambda: GemmaLayer(expert), lambda: RMSNorm(width))
        self.state_proj = nn.Linear(config.padded_state_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def embed_state(self, state: Tensor) -> Tensor:
        """Normalized state [B, padded_state_dim] → its token [B, 1, D]."""
        return self.state_proj(state).unsqueeze(-2)

    def state_rotary(self, prefix: int) -> RotaryTable:
        """Rotary table of the state's token behind a prefix of so many."""
        positions = torch.tensor([[prefix]], device=self.state_proj.weight.device)
        return rotary_table(positions, self.config.expert.head_dim)

    def with_state(self, cache: Sequence[KeyValue], state: Tensor, prefix: int) -> list[KeyValue]:
        """Keys and values of the prefix, then those of the state.

        Args:
            cache: of a prefix, per layer.
            state: [B, padded_state_dim], normalized.
            prefix: its length.
        """
        token, rotary, behind = self.embed_state(state), self.state_rotary(prefix), []
        for layer, past in zip(self.expert_layers, cache, strict=True):
            token, own = layer(token, rotary, None, past)
            behind.append(joined(past, own))
        return behind

    def time_code(self, times: Tensor) -> Tensor:
        """Flow times [S] → [S, D], sines and cosines."""
        code = time_embedding(times, self.config.expert.width, TIME_MIN_PERIOD, TIME_MAX_PERIOD)
        return code.to(self.action_in_proj.weight)

    def embed_actions(self, x_t: Tensor, code: Tensor) -> Tensor:
        """Noisy actions [B, H, A] at the time of a code [1 or B, D] → tokens [B, H, D]."""
        actions = self.action_in_proj(x_t)
        beside = code.unsqueeze(-2).expand_as(actions)
        hidden = self.action_time_mlp_in(torch.cat((actions, beside), dim=-1))
        return self.action_time_mlp_out(F.silu(hidden))

    def velocity(
        self,
        x_t: Tensor,
        code: Tensor,
        cache: Sequence[KeyValue | PreallocatedKVCache],
        rotary: RotaryTable,
    ) -> Tensor:
        """The learned velocity at one flow time.

        Args:
            x_t: [B, horizon, action_dim] noisy normalized actions.
            code: [1 or B, D] from ``time_code``.
            cache: keys and values of prefix and state per layer.
            rotary: from ``suffix_rotary``, behind prefix and state.

        Returns:
            [B, horizon, action_dim] velocity (noise - actions).
        """
        x = self.embed_actions(x_t, code)
        for layer, past in zip(self.expert_layers, cache, strict=True):
            x, _ = layer(x, rotary, None, past)
        return self.read_out(x)

    def read_out(self, x: Tensor) -> Tensor:
        """Final norm and projection, [B, horizon, D] → [B, horizon, action_dim]."""
        return self.action_out_proj(self.expert_norm(x))


def joined(past: KeyValue, own: KeyValue) -> KeyValue:
    """Keys and values one behind the other."""
    return torch.cat((past[0], own[0]), dim=-2), torch.cat((past[1], own[1]), dim=-2)
