"""Between the robot's units and those of a policy like pi0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import ObservationError
from omega_qvla.policies.base import Observation
from omega_qvla.policies.pi0_like.config import Pi0LikeConfig
from omega_qvla.policies.processing.images import FITS
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.observations import (
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.processing.prompts import format_prompt
from omega_qvla.policies.processing.relative_actions import Mask
from omega_qvla.policies.processing.tokenizers import Tokenizer


class Inputs(NamedTuple):
    """Pixels [1, V, 3, S, S], token ids [1, T], normalized state [1, state_dim]."""

    pixels: Tensor
    token_ids: Tensor
    state: Tensor


@dataclass(frozen=True)
class Pi0LikeProcessor:
    """Observation → tensors; normalized chunk → actions."""

    config: Pi0LikeConfig
    statistics: NormalizationStatistics
    tokenizer: Tokenizer

    relative_actions: ClassVar[Mask] = ()

    def encode(self, observation: Observation) -> Inputs:
        """Tensors of one observation; refuses what is missing, misshaped or too long."""
        config = self.config
        images = require_images(observation, config.cameras)
        fit, size = FITS["antialiased"], config.vision.image_size
        pixels = torch.stack([fit(image, size) for image in images])
        tokens = self.tokenizer.encode(format_prompt(require_prompt(observation), None))
        if len(tokens) > config.prompt_length:
            raise ObservationError(
                f"the prompt has {len(tokens)} tokens, this policy takes {config.prompt_length}"
            )
        state = self.statistics.state.normalize(require_state(observation, config.state_dim))
        state = torch.from_numpy(np.asarray(state, np.float32))
        return Inputs(pixels.unsqueeze(0), torch.tensor([tokens]), state.unsqueeze(0))

    def anchor(self, observation: Observation) -> None:
        """Nothing: actions are absolute."""

    def decode(self, chunk: Tensor, anchor: None = None) -> np.ndarray:
        """Normalized chunk [H, A] → robot actions [H, robot_action_dim], float32."""
        robot = chunk[:, : self.config.robot_action_dim].to(torch.float32).cpu().numpy()
        return self.statistics.actions.unnormalize(robot)
