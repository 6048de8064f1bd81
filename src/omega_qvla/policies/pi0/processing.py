"""Between the robot's units and pi0's: the state is a vector of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omega_qvla.policies.base import Observation
from omega_qvla.policies.paligemma.processing import PaligemmaProcessor
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.processing.prompts import format_prompt


class Inputs(NamedTuple):
    """What the network reads of one observation.

    Attributes:
        pixels: [1, V, 3, S, S] in [-1, 1]; image tokens once the vision tower has seen them.
        token_ids: [1, T].
        state: [1, padded_state_dim] normalized, zeros behind the robot's own numbers.
    """

    pixels: Tensor
    token_ids: Tensor
    state: Tensor


@dataclass(frozen=True)
class Pi0Processor(PaligemmaProcessor):
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: Pi0Config

    def encode(self, observation: Observation) -> Inputs:
        """Observation → what the network reads.

        Raises:
            ObservationError: something is missing, misshaped, not finite or too long.
        """
        state = self.normalized_state(observation)
        padded = np.pad(state, (0, self.config.padded_state_dim - len(state)))
        return Inputs(
            self.pixels(observation),
            self.token_ids(self.prompt(observation)),
            torch.from_numpy(padded).unsqueeze(0),
        )

    def prompt(self, observation: Observation) -> str:
        """The instruction and a line break."""
        instruction = self.instruction(observation)
        if self.config.prompt == "cleaned":
            return format_prompt(instruction, None)
        return instruction if instruction.endswith("\n") else f"{instruction}\n"
