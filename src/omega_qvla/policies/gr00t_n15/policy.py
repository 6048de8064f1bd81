"""GR00T N1.5 from observation to action chunk: the network, its processor and its clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from omega_qvla.checkpoints.weight_store import WeightStore
from omega_qvla.errors import PolicyError
from omega_qvla.policies.adaptive_norms import AdaptiveNorms
from omega_qvla.policies.base import AttentionLayer, Observation, Stage, State
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import (
    Gr00tN15Module,
    Observed,
    Schedule,
    remove_modulation,
    sample_chunk,
    stacked_keys,
)
from omega_qvla.policies.gr00t_n15.processing import Gr00tProcessor
from omega_qvla.policies.gr00t_n15.stages import (
    BLOCKS,
    LANGUAGE,
    MODULATION_PATHS,
    component_of,
    gr00t_stages,
)
from omega_qvla.policies.guidance import Guidance


class EncodedImages(NamedTuple):
    """Image tokens [B, V·patches, D], token ids [B, T] and normalized state [B, state_width]."""

    images: Tensor
    token_ids: Tensor
    state: Tensor


class Gr00tN15Policy(AdaptiveNorms):
    """A GR00T N1.5 policy, full precision or with quantized modules in place of its linears."""

    family = "gr00t_n15"
    module: Gr00tN15Module
    processor: Gr00tProcessor
    config: Gr00tN15Config
    config_type, module_type, processor_type = Gr00tN15Config, Gr00tN15Module, Gr00tProcessor
    embedding_path = f"{LANGUAGE}.embed_tokens"

    @property
    def modulation_shape(self) -> tuple[int, int, int]:
        return self.config.norms, 2, self.config.head.width

    @property
    def modulation_paths(self) -> Sequence[str]:
        names = (name for name, _ in self.module.named_modules())
        return (*MODULATION_PATHS, *(name for name in names if name.endswith(".norm1.linear")))

    def remove_modulation(self) -> None:
        remove_modulation(self.module)

    def make_schedule(self, times: Tensor) -> Schedule:
        return Schedule(self._modulation(times), self.module.time_part(times))

    def component_of(self, parameter: str) -> str:
        return component_of(parameter)

    def stages(self) -> Sequence[Stage]:
        return gr00t_stages(self.module, self.clock, self.steps)

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {**self.processor.encode(observation)._asdict(), "noise": noise}

    def encode_images(self, inputs: Sequence[Tensor]) -> EncodedImages:
        pixels, token_ids, state = (part.to(self.device) for part in inputs)
        return EncodedImages(self.module.embed_images(pixels), token_ids, state)

    def prefill(self, encoded: EncodedImages) -> Observed:
        prompt = self.module.embed_prompt(encoded.images, encoded.token_ids)
        features = self.module.head_features(self.module.backbone_features(prompt))
        return self.module.observe(features, encoded.state)

    def denoise(
        self,
        observed: Observed,
        noise: Tensor,
        steps: int,
        guidance: Guidance | None = None,
    ) -> Tensor:
        schedule = self.schedule(steps)
        return sample_chunk(self.module, observed, noise, schedule, self.clock, guidance)

    def head_attention(self) -> Sequence[AttentionLayer]:
        head = self.config.head
        paths = [f"{BLOCKS}.{i}.attn1" for i in range(head.depth)]
        return [
            AttentionLayer(p, f"{p}.to_q", f"{p}.to_out.0", head.heads, head.width // head.heads)
            for p in paths
        ]

    def keep_embodiments(
        self, embodiments: Sequence[int], embodiment: int | None = None
    ) -> Gr00tN15Policy:
        """The same policy without the layers of other embodiments; nothing else is copied.

        Args:
            embodiments: the ids to keep.
            embodiment: the one that acts; the present one by default.

        Raises:
            PolicyError: one of them is not there, the acting one would not be, or the policy is
                quantized already.
        """
        config = self.config.keeping(embodiments, embodiment)
        rows = [self.config.embodiments.index(number) for number in config.embodiments]
        with torch.device("meta"):
            module = Gr00tN15Module(config)
        present = dict(self.module.named_parameters())
        if present.keys() != dict(module.named_parameters()).keys():
            raise PolicyError("choose embodiments before quantizing: this policy is quantized")
        stacked, removed = stacked_keys(), 0
        for name, parameter in present.items():
            path, _, kind = name.rpartition(".")
            if name in stacked:
                kept = nn.Parameter(parameter[rows], requires_grad=False)
                removed += parameter.numel() - kept.numel()
                parameter = kept
            setattr(module.get_submodule(path), kind, parameter)
        processor = Gr00tProcessor(config, self.processor.statistics, self.processor.tokenizer)
        return Gr00tN15Policy(
            module,
            processor,
            dropped_parameters=self.dropped_parameters + removed,
            decisions=self.decisions,
            store=None if self.store is None else KeptRows(self.store, stacked, rows),
        )


class KeptRows:
    """A store that keeps some rows of stacked parameters.

    Args:
        store: where everything comes from.
        names: the stacked parameters.
        rows: the rows of them that are kept.
    """

    def __init__(self, store: WeightStore, names: set[str], rows: Sequence[int]) -> None:
        self._store, self._names, self._rows = store, set(names), list(rows)

    def read(self, name: str) -> Tensor:
        """One parameter, float32."""
        found = self._store.read(name)
        return found[self._rows] if name in self._names else found

    def dtype(self, name: str) -> torch.dtype:
        """A type that holds one parameter as it is."""
        return self._store.dtype(name)
