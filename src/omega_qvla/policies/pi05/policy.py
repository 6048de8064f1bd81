"""pi0.5 from observation to action chunk: the network, its processor and its clock together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import AttentionLayer, Observation, Stage, State
from omega_qvla.policies.layers.gemma import KeyValue
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi05.network import (
    Pi05Config,
    Pi05Module,
    remove_modulation,
    sample_chunk,
)
from omega_qvla.policies.pi05.stages import (
    EXPERT_LAYERS,
    MODULATION_PATHS,
    component_of,
    pi05_stages,
)
from omega_qvla.policies.processing.images import FITS
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.observations import (
    Tokenizer,
    discretize_state,
    format_prompt,
    load_tokenizer,
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.processing.relative_actions import Mask, to_absolute


@dataclass(frozen=True)
class Pi05Processor:
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: Pi05Config
    statistics: NormalizationStatistics
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        """Statistics and tokenizer must fit the network.

        Raises:
            PolicyError: too few quantiles, or token ids beyond the embedding.
        """
        for name, normalization, width in (
            ("state", self.statistics.state, self.config.state_dim),
            ("actions", self.statistics.actions, self.config.robot_action_dim),
        ):
            if normalization.width < width:
                raise PolicyError(
                    f"there are statistics of {normalization.width} dimensions of {name}, the "
                    f"robot has {width}"
                )
        if self.tokenizer.size > self.config.vocabulary:
            raise PolicyError(
                f"the tokenizer has {self.tokenizer.size} tokens, the embedding "
                f"{self.config.vocabulary}"
            )

    @property
    def relative_actions(self) -> Mask:
        """Which of the robot's actions are relative to its state."""
        return self.config.relative_actions

    def encode(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Observation → (pixels [1, V, 3, S, S] in [-1, 1], token ids [1, T]).

        Raises:
            ObservationError: something is missing, misshaped, not finite or too long.
        """
        images = require_images(observation, self.config.cameras)
        size = self.config.vision.image_size
        fit = FITS[self.config.image_fit]
        pixels = torch.stack([fit(image, size) for image in images])
        tokens = self._tokens(self.prompt(observation))
        if len(tokens) > self.config.prompt_length:
            raise ObservationError(
                f"the prompt has {len(tokens)} tokens, this policy takes at most "
                f"{self.config.prompt_length}"
            )
        return pixels.unsqueeze(0), torch.tensor([tokens])

    def prompt(self, observation: Observation) -> str:
        """The full prompt, with the state written into it where the policy wants that."""
        instruction = require_prompt(observation)
        if not self.config.state_in_prompt:
            return format_prompt(instruction, None)
        state = require_state(observation, self.config.state_dim)
        normalized = self.statistics.state.normalize(state)
        if self.config.prompt_state_dim is not None:
            missing = self.config.prompt_state_dim - normalized.shape[-1]
            normalized = np.pad(normalized, (0, max(0, missing)))
        return format_prompt(instruction, discretize_state(normalized))

    def _tokens(self, prompt: str) -> list[int]:
        """Token ids; a closing line break is a token of its own, as openpi encodes it."""
        if not prompt.endswith("\n"):
            return self.tokenizer.encode(prompt)
        start = len(self.tokenizer.encode(""))
        return [*self.tokenizer.encode(prompt[:-1]), *self.tokenizer.encode("\n")[start:]]

    def anchor(self, observation: Observation) -> np.ndarray | None:
        """The state [state_dim] that relative actions are counted from; None without such actions.

        Raises:
            ObservationError: the state is missing, misshaped or not finite.
        """
        if not any(self.relative_actions):
            return None
        return require_state(observation, self.config.state_dim)

    def decode(self, chunk: Tensor, anchor: np.ndarray | None = None) -> np.ndarray:
        """Normalized chunk [H, A] → robot actions [H, robot_action_dim], float32 and absolute.

        Args:
            chunk: from the network.
            anchor: what ``anchor`` gives of the observation that the chunk answers.

        Raises:
            PolicyError: actions are relative and there is no anchor.
        """
        robot = chunk[:, : self.config.robot_action_dim].to(torch.float32).cpu().numpy()
        actions = self.statistics.actions.unnormalize(robot)
        return to_absolute(actions, anchor, self.relative_actions)


class Pi05Policy(NativePolicy):
    """A pi0.5 policy, full precision or with quantized modules in place of its linears."""

    family = "pi05"
    module: Pi05Module
    processor: Pi05Processor
    config: Pi05Config
    embedding_path = "paligemma_with_expert.paligemma.model.language_model.embed_tokens"

    @property
    def modulation_shape(self) -> tuple[int, int, int]:
        return self.config.norms, 3, self.config.expert.width

    @property
    def modulation_paths(self) -> Sequence[str]:
        norms = (name for name, _ in self.module.named_modules() if name.endswith(".dense"))
        return (*MODULATION_PATHS, *norms)

    def remove_modulation(self) -> None:
        remove_modulation(self.module)

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        files = {
            "norm_stats.json": self.processor.statistics.dump().encode(),
            "tokenizer.json": json.dumps(self.processor.tokenizer.dump()).encode(),
            **self.processor.tokenizer.files(),
        }
        return self.config.model_dump(mode="json"), files

    @classmethod
    def skeleton(cls, config: Mapping[str, Any], files: Mapping[str, bytes]) -> Pi05Policy:
        try:
            parsed = Pi05Config.model_validate(config)
            statistics = NormalizationStatistics.parse(files["norm_stats.json"], "norm_stats.json")
            tokenizer = load_tokenizer(json.loads(files["tokenizer.json"]), "tokenizer.json", files)
        except (ValidationError, KeyError, ValueError) as error:
            raise PolicyError(f"the artifact's pi0.5 description is invalid: {error}") from error
        with torch.device("meta"):
            module = Pi05Module(parsed)
        return cls(module, Pi05Processor(parsed, statistics, tokenizer))

    def component_of(self, parameter: str) -> str:
        return component_of(parameter)

    def stages(self) -> Sequence[Stage]:
        return pi05_stages(self.module, self.clock, self.steps)

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        pixels, token_ids = self.processor.encode(observation)
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {"pixels": pixels, "token_ids": token_ids, "noise": noise}

    def embed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pixels and token ids → (image tokens [B, V·patches, D], token ids [B, T])."""
        pixels, token_ids = (part.to(self.device) for part in inputs)
        return self.module.embed_images(pixels), token_ids

    def read(self, seen: tuple[Tensor, Tensor]) -> tuple[list[KeyValue], int]:
        """Keys and values of the prefix per layer, and its length."""
        images, token_ids = seen
        prefix = torch.cat((images, self.module.embed_text(token_ids)), dim=1)
        positions = torch.arange(prefix.shape[1], device=prefix.device).unsqueeze(0)
        return self.module.prefill(prefix, positions)[0], prefix.shape[1]

    def denoise(self, observed: tuple[list[KeyValue], int], noise: Tensor, steps: int) -> Tensor:
        cache, length = observed
        return sample_chunk(self.module, cache, length, noise, self.schedule(steps), self.clock)

    def head_attention(self) -> Sequence[AttentionLayer]:
        expert = self.config.expert
        paths = [f"{EXPERT_LAYERS}.{i}.self_attn" for i in range(self.config.depth)]
        return [
            AttentionLayer(p, f"{p}.q_proj", f"{p}.o_proj", expert.heads, expert.head_dim)
            for p in paths
        ]

    def reads_per_chunk(self, path: str) -> float:
        if path == self.embedding_path:
            return 0.0
        return self.steps if "gemma_expert" in path or path.startswith("action_") else 1.0

    def prompt_tokens(self, observation: Observation) -> int:
        pixels, token_ids = self.processor.encode(observation)
        return pixels.shape[1] * self.config.tokens_per_image + token_ids.shape[1]
