"""Between the robot's units and GR00T N1.5's: images, state, actions, prompt.

Conventions follow Isaac-GR00T's N1.5 release (``data/transform``, ``model/transforms.py``):

* images lose a margin (``image_crop``), are resized without regard to their proportions and mapped
  to [-1, 1] (``images.py``);
* state and actions are normalized part by part (``normalization.py``) and padded with zeros;
* the prompt holds one token per image token, in the place where the image goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import Observation
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.processing.images import crop_and_resize, stretch_bicubic
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Unchanged
from omega_qvla.policies.processing.observations import (
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.processing.relative_actions import Mask
from omega_qvla.policies.processing.tokenizers import Tokenizer


class Gr00tInputs(NamedTuple):
    """One observation as tensors.

    Attributes:
        pixels: [1, V, 3, S, S] float32 in [-1, 1].
        token_ids: [1, T] int64, with one place per image token.
        state: [1, state_width] float32, normalized and padded.
    """

    pixels: Tensor
    token_ids: Tensor
    state: Tensor


@dataclass(frozen=True)
class Gr00tProcessor:
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: Gr00tN15Config
    statistics: NormalizationStatistics
    tokenizer: Tokenizer

    relative_actions: ClassVar[Mask] = ()

    def __post_init__(self) -> None:
        """Statistics and tokenizer must fit the network.

        Raises:
            PolicyError: another number of dimensions, or token ids beyond the embedding.
        """
        for name, normalization, width in (
            ("state", self.statistics.state, self.config.state_dim),
            ("actions", self.statistics.actions, self.config.robot_action_dim),
        ):
            if normalization.width != width:
                raise PolicyError(
                    f"the statistics have {normalization.width} dimensions of {name}, the policy "
                    f"{width}"
                )
        normalized = self.statistics.state.normalize(np.zeros(self.config.state_dim))
        if normalized.shape[-1] > self.config.state_width:
            raise PolicyError(
                f"the state becomes {normalized.shape[-1]} numbers, the network takes "
                f"{self.config.state_width}"
            )
        if self.tokenizer.size > self.config.vocabulary:
            raise PolicyError(
                f"the tokenizer has {self.tokenizer.size} tokens, the embedding "
                f"{self.config.vocabulary}"
            )

    def encode(self, observation: Observation) -> Gr00tInputs:
        """Observation → tensors.

        Raises:
            ObservationError: something is missing, misshaped, not finite or too long.
        """
        config = self.config
        images = require_images(observation, config.cameras)
        pixels = torch.stack([self._fit(image) for image in images])
        state = require_state(observation, config.state_dim)
        padded = np.zeros(config.state_width, np.float32)
        normalized = self.statistics.state.normalize(state)
        padded[: normalized.shape[-1]] = normalized
        token_ids = self.tokenize(require_prompt(observation), len(images))
        return Gr00tInputs(
            pixels.unsqueeze(0), torch.tensor([token_ids]), torch.from_numpy(padded).unsqueeze(0)
        )

    def _fit(self, image: np.ndarray) -> Tensor:
        size = self.config.vision.image_size
        if self.config.image_filter == "bicubic":
            return stretch_bicubic(image, size)
        return crop_and_resize(image, size, self.config.image_crop)

    def tokenize(self, instruction: str, images: int) -> list[int]:
        """Token ids of the whole prompt.

        Raises:
            ObservationError: it is too long, or its text contains the image token.
        """
        config = self.config
        places = [config.image_token] * config.tokens_per_image
        token_ids: list[int] = []
        text = 0
        for number, piece in enumerate(config.prompt.pieces(instruction.strip(), images)):
            token_ids += places if number else []
            encoded = self.tokenizer.encode(piece) if piece else []
            if config.image_token in encoded:
                raise ObservationError("the prompt contains the token that stands for images")
            token_ids += encoded
            text += len(encoded)
        if text > config.prompt_length:
            raise ObservationError(
                f"the prompt has {text} tokens, this policy takes at most {config.prompt_length}"
            )
        return token_ids

    def anchor(self, observation: Observation) -> None:
        """Nothing: the actions of GR00T N1.5 are absolute."""

    def decode(self, chunk: Tensor, anchor: None = None) -> np.ndarray:
        """Normalized chunk [H, A] → robot actions [H, robot_action_dim], float32."""
        robot = chunk[:, : self.config.robot_action_dim].to(torch.float32).cpu().numpy()
        return self.statistics.actions.unnormalize(robot)


def identity_statistics(config: Gr00tN15Config) -> NormalizationStatistics:
    """State and actions as they are; for policies with random weights."""
    return NormalizationStatistics(
        state=Unchanged(width=config.state_dim), actions=Unchanged(width=config.robot_action_dim)
    )
