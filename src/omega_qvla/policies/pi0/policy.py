"""pi0 from observation to action chunk: the network, its processor and its clock together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.policies.base import AttentionLayer, Observation, Stage, State
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import KeyValue, PreallocatedKVCache
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.paligemma.names import EMBED_TOKENS
from omega_qvla.policies.paligemma.stages import component_of, expert_attention
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.network import STATE_TIME, Pi0Module
from omega_qvla.policies.pi0.processing import Inputs, Pi0Processor
from omega_qvla.policies.pi0.stages import pi0_stages


class Pi0Policy(NativePolicy):
    """A pi0 policy, full precision or with quantized modules in place of its linears."""

    family = "pi0"
    module: Pi0Module
    processor: Pi0Processor
    config: Pi0Config
    config_type, module_type, processor_type = Pi0Config, Pi0Module, Pi0Processor
    statistics_file = "norm_stats.json"
    embedding_path = EMBED_TOKENS

    def component_of(self, parameter: str) -> str:
        return component_of(parameter, {})

    def stages(self) -> Sequence[Stage]:
        return pi0_stages(self.module, self.clock, self.steps)

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {**self.processor.encode(observation)._asdict(), "noise": noise}

    def encode_images(self, inputs: Sequence[Tensor]) -> Inputs:
        """As encoded, but image tokens [B, V·patches, D] in place of pixels."""
        pixels, token_ids, state = (part.to(self.device) for part in inputs)
        return Inputs(self.module.embed_images(pixels), token_ids, state)

    def prefill(self, encoded: Inputs) -> tuple[list[KeyValue], int]:
        """Keys and values of prefix and state per layer, and how many tokens these are."""
        images, token_ids, state = encoded
        cache, length = self.module.prefill_observation(images, token_ids)
        with self.clock.step(0, STATE_TIME):
            return self.module.with_state(cache, state, length), length + 1

    def make_schedule(self, times: Tensor) -> Tensor:
        return self.module.time_code(times)

    def denoise(
        self,
        observed: tuple[list[KeyValue], int],
        noise: Tensor,
        steps: int,
        guidance: Guidance | None = None,
    ) -> Tensor:
        seen, length = observed
        codes, rotary = self.schedule(steps), self.module.suffix_rotary(length)
        cache = [PreallocatedKVCache.after(kv, self.config.horizon) for kv in seen]

        def velocity(x: Tensor, step: int) -> Tensor:
            return self.module.velocity(x, codes[step : step + 1], cache, rotary)

        return integrate(velocity, noise, steps, self.clock, guidance)

    def head_attention(self) -> Sequence[AttentionLayer]:
        return expert_attention(self.config)
