"""pi0.5 from observation to action chunk: the network, its processor and its clock together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omega_qvla.policies.adaptive_norms import AdaptiveNorms
from omega_qvla.policies.base import AttentionLayer, Observation, Stage, State
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.attention import KeyValue
from omega_qvla.policies.paligemma.names import EMBED_TOKENS
from omega_qvla.policies.paligemma.stages import component_of, expert_attention
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module, remove_modulation, sample_chunk
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.pi05.stages import ADAPTIVE, MODULATION_PATHS, pi05_stages


class Pi05Policy(AdaptiveNorms):
    """A pi0.5 policy, full precision or with quantized modules in place of its linears."""

    family = "pi05"
    module: Pi05Module
    processor: Pi05Processor
    config: Pi05Config
    config_type, module_type, processor_type = Pi05Config, Pi05Module, Pi05Processor
    statistics_file = "norm_stats.json"
    embedding_path = EMBED_TOKENS

    @property
    def modulation_shape(self) -> tuple[int, int, int]:
        return self.config.norms, 3, self.config.expert.width

    @property
    def modulation_paths(self) -> Sequence[str]:
        norms = (name for name, _ in self.module.named_modules() if name.endswith(".dense"))
        return (*MODULATION_PATHS, *norms)

    def remove_modulation(self) -> None:
        remove_modulation(self.module)

    def component_of(self, parameter: str) -> str:
        return component_of(parameter, ADAPTIVE)

    def stages(self) -> Sequence[Stage]:
        return pi05_stages(self.module, self.clock, self.steps)

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        pixels, token_ids = self.processor.encode(observation)
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {"pixels": pixels, "token_ids": token_ids, "noise": noise}

    def encode_images(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pixels and token ids → (image tokens [B, V·patches, D], token ids [B, T])."""
        pixels, token_ids = (part.to(self.device) for part in inputs)
        return self.module.embed_images(pixels), token_ids

    def prefill(self, encoded: tuple[Tensor, Tensor]) -> tuple[list[KeyValue], int]:
        """Keys and values of the prefix per layer, and its length."""
        return self.module.prefill_observation(*encoded)

    def denoise(
        self,
        observed: tuple[list[KeyValue], int],
        noise: Tensor,
        steps: int,
        guidance: Guidance | None = None,
    ) -> Tensor:
        cache, length = observed
        schedule = self.schedule(steps)
        return sample_chunk(self.module, cache, length, noise, schedule, self.clock, guidance)

    def head_attention(self) -> Sequence[AttentionLayer]:
        return expert_attention(self.config)
