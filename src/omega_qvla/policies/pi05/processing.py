"""Between the robot's units and pi0.5's: images, prompt, actions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import Observation
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.processing.images import FITS
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.observations import (
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.processing.prompts import discretize_state, format_prompt
from omega_qvla.policies.processing.relative_actions import Mask, to_absolute
from omega_qvla.policies.processing.tokenizers import Tokenizer


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
