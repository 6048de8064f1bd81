"""Between the robot's units and GR00T N1.5's: images, state, actions, prompt.

Conventions follow Isaac-GR00T's N1.5 release (``data/transform``, ``model/transforms.py``):

* images lose a margin (``image_crop``), are resized without regard to their proportions,
  bilinear with antialiasing, rounded down to bytes again and mapped to [-1, 1];
* state and actions are scaled dimension by dimension, by range or by mean and deviation, which
  both are x ↦ (x - offset) / scale; then they are padded with zeros;
* the prompt holds one token per image token, in the place where the image goes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import Observation
from omega_qvla.policies.gr00t_n15 import Gr00tN15Config
from omega_qvla.policies.processing import (
    Tokenizer,
    require_images,
    require_prompt,
    require_state,
)


class Scaling(BaseModel):
    """x ↦ (x - offset) / scale for every dimension of one quantity, in the robot's units.

    A scale of 0 marks a dimension that never changed: it becomes 0, and comes back as its offset.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    offset: tuple[float, ...]
    scale: tuple[float, ...]

    @model_validator(mode="after")
    def _widths_must_match(self) -> Scaling:
        if len(self.offset) != len(self.scale) or min(self.scale, default=0.0) < 0.0:
            raise ValueError("offset and scale must have the same length, and no scale be negative")
        return self

    @classmethod
    def from_range(cls, low: Sequence[float], high: Sequence[float]) -> Scaling:
        """[low, high] ↦ [-1, 1]."""
        pairs = list(zip(low, high, strict=True))
        return cls(
            offset=tuple((a + b) / 2.0 for a, b in pairs),
            scale=tuple((b - a) / 2.0 for a, b in pairs),
        )

    @classmethod
    def from_moments(cls, mean: Sequence[float], deviation: Sequence[float]) -> Scaling:
        """Zero mean, unit deviation."""
        return cls(offset=tuple(mean), scale=tuple(deviation))

    def joined(self, other: Scaling) -> Scaling:
        """The dimensions of both, these first."""
        return Scaling(offset=self.offset + other.offset, scale=self.scale + other.scale)

    @property
    def width(self) -> int:
        return len(self.offset)

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., width] → network units, float32."""
        scale = np.asarray(self.scale)
        moved = x - np.asarray(self.offset)
        safe = np.where(scale > 0.0, scale, 1.0)
        return np.where(scale > 0.0, moved / safe, 0.0).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32."""
        return (x * np.asarray(self.scale) + np.asarray(self.offset)).astype(np.float32)


class Gr00tStatistics(BaseModel):
    """Scaling of one embodiment's state and actions."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    state: Scaling
    actions: Scaling

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Gr00tStatistics:
        """What ``dump`` wrote; ``where`` names it in errors.

        Raises:
            PolicyError: not JSON, or not such statistics.
        """
        try:
            return cls.model_validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            raise PolicyError(
                f"{where} does not hold offset and scale of state and actions: {error}"
            ) from error

    def dump(self) -> str:
        """JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1)


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
    statistics: Gr00tStatistics
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        """Statistics and tokenizer must fit the network.

        Raises:
            PolicyError: another number of dimensions, or token ids beyond the embedding.
        """
        for name, scaling, width in (
            ("state", self.statistics.state, self.config.state_dim),
            ("actions", self.statistics.actions, self.config.robot_action_dim),
        ):
            if scaling.width != width:
                raise PolicyError(
                    f"the statistics have {scaling.width} dimensions of {name}, the policy {width}"
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
        size, crop = config.vision.image_size, config.image_crop
        pixels = torch.stack([crop_and_resize(image, size, crop) for image in images])
        state = require_state(observation, config.state_dim)
        padded = np.zeros(config.state_width, np.float32)
        padded[: config.state_dim] = self.statistics.state.normalize(state)
        token_ids = self.tokenize(require_prompt(observation), len(images))
        return Gr00tInputs(
            pixels.unsqueeze(0), torch.tensor([token_ids]), torch.from_numpy(padded).unsqueeze(0)
        )

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

    def decode(self, chunk: Tensor) -> np.ndarray:
        """Normalized chunk [H, A] → robot actions [H, robot_action_dim], float32."""
        robot = chunk[:, : self.config.robot_action_dim].to(torch.float32).cpu().numpy()
        return self.statistics.actions.unnormalize(robot)


def crop_and_resize(image: np.ndarray, size: int, crop: float) -> Tensor:
    """One image uint8 [H, W, 3] → float32 [3, size, size] in [-1, 1], its middle stretched."""
    height, width = (max(1, int(side * crop)) for side in image.shape[:2])
    top, left = round((image.shape[0] - height) / 2.0), round((image.shape[1] - width) / 2.0)
    middle = image[top : top + height, left : left + width]
    pixels = torch.from_numpy(np.ascontiguousarray(middle)).permute(2, 0, 1).to(torch.float32)
    if (height, width) != (size, size):
        pixels = F.interpolate(
            pixels.unsqueeze(0) / 255.0, size=(size, size), mode="bilinear", antialias=True
        )[0]
        pixels = (pixels * 255.0).floor_().clamp_(0.0, 255.0)
    return pixels / 127.5 - 1.0


def identity_statistics(config: Gr00tN15Config) -> Gr00tStatistics:
    """State and actions as they are; for policies with random weights."""
    return Gr00tStatistics(
        state=Scaling(offset=(0.0,) * config.state_dim, scale=(1.0,) * config.state_dim),
        actions=Scaling(
            offset=(0.0,) * config.robot_action_dim, scale=(1.0,) * config.robot_action_dim
        ),
    )
