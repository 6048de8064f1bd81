"""Between the robot's units and those of a policy on PaliGemma: images, tokens, actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import Observation
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.processing.images import FITS
from omega_qvla.policies.processing.normalization import NormalizationStatistics, unit_quantiles
from omega_qvla.policies.processing.observations import (
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.processing.relative_actions import Mask, to_absolute
from omega_qvla.policies.processing.robots import Robot, from_aloha, to_aloha
from omega_qvla.policies.processing.tokenizers import ByteTokenizer, Tokenizer


@dataclass(frozen=True)
class PaligemmaProcessor:
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: PaligemmaConfig
    statistics: NormalizationStatistics
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        """Statistics and tokenizer must fit the network.

        Raises:
            PolicyError: statistics of too few dimensions, or token ids beyond the embedding.
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

    @property
    def robot(self) -> Robot:
        """Conventions of the robot."""
        return self.config.robot

    def pixels(self, observation: Observation) -> Tensor:
        """The images, [1, V, 3, S, S] in [-1, 1].

        Raises:
            ObservationError: a camera is missing, unknown or misshaped.
        """
        size, fit = self.config.vision.image_size, FITS[self.config.image_fit]
        images = require_images(observation, self.config.cameras)
        return torch.stack([fit(image, size) for image in images]).unsqueeze(0)

    def token_ids(self, prompt: str) -> Tensor:
        """The tokens of a full prompt, [1, T]; a closing line break is one of its own.

        Raises:
            ObservationError: there are too many.
        """
        tokens = self._tokens(prompt)
        if len(tokens) > self.config.prompt_length:
            raise ObservationError(
                f"the prompt has {len(tokens)} tokens, this policy takes at most "
                f"{self.config.prompt_length}"
            )
        return torch.tensor([tokens])

    def _tokens(self, prompt: str) -> list[int]:
        """Token ids; a closing line break is a token of its own, as openpi encodes it."""
        if not prompt.endswith("\n"):
            return self.tokenizer.encode(prompt)
        start = len(self.tokenizer.encode(""))
        return [*self.tokenizer.encode(prompt[:-1]), *self.tokenizer.encode("\n")[start:]]

    def normalized_state(self, observation: Observation) -> np.ndarray:
        """The robot's state [state_dim] in the network's units, float32.

        Raises:
            ObservationError: missing, misshaped or not finite.
        """
        return self.statistics.state.normalize(self._state(observation))

    def _state(self, observation: Observation) -> np.ndarray:
        """The state [state_dim] in the units that the network was trained in."""
        width = self.config.state_dim
        if self.config.robot.adapt_to_pi:
            return from_aloha(require_state(observation, width, np.float64))
        return require_state(observation, width)

    def instruction(self, observation: Observation) -> str:
        """The instruction, or the policy's own where the observation has none.

        Raises:
            ObservationError: there is neither.
        """
        default = self.config.robot.default_prompt
        if default is not None and observation.get("prompt") is None:
            return default
        return require_prompt(observation)

    def anchor(self, observation: Observation) -> np.ndarray | None:
        """What relative actions are counted from, [state_dim] float32 in the network's units.

        None where no action is relative.

        Raises:
            ObservationError: the state is missing, misshaped or not finite.
        """
        if not any(self.relative_actions):
            return None
        return self._state(observation).astype(np.float32)

    def robot_units(self, actions: np.ndarray) -> np.ndarray:
        """Absolute actions [..., robot_action_dim] of the network as the robot takes them."""
        return to_aloha(actions) if self.config.robot.adapt_to_pi else actions

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
        return self.robot_units(to_absolute(actions, anchor, self.relative_actions))


_Processor = TypeVar("_Processor", bound=PaligemmaProcessor)


def reading_bytes(made_by: type[_Processor], config: PaligemmaConfig) -> _Processor:
    """The processor of a random policy: prompts are bytes, statistics those of unit range."""
    config = config.model_copy(update={"prompt_length": 256})
    statistics = NormalizationStatistics(
        state=unit_quantiles(config.state_dim), actions=unit_quantiles(config.robot_action_dim)
    )
    return made_by(config, statistics, ByteTokenizer())
