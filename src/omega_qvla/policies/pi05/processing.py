"""Between the robot's units and pi0.5's: the state is part of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from omega_qvla.policies.base import Observation
from omega_qvla.policies.paligemma.processing import PaligemmaProcessor
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.processing.prompts import discretize_state, format_prompt


@dataclass(frozen=True)
class Pi05Processor(PaligemmaProcessor):
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: Pi05Config

    def encode(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Observation → (pixels [1, V, 3, S, S] in [-1, 1], token ids [1, T]).

        Raises:
            ObservationError: something is missing, misshaped, not finite or too long.
        """
        return self.pixels(observation), self.token_ids(self.prompt(observation))

    def prompt(self, observation: Observation) -> str:
        """The full prompt, with the state written into it where the policy wants that."""
        instruction = self.instruction(observation)
        if not self.config.state_in_prompt:
            return format_prompt(instruction, None)
        normalized = self.normalized_state(observation)
        if self.config.prompt_state_dim is not None:
            missing = self.config.prompt_state_dim - normalized.shape[-1]
            normalized = np.pad(normalized, (0, max(0, missing)))
        return format_prompt(instruction, discretize_state(normalized))
