"""What fixes the shape and the conventions of a pi0 policy."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from omega_qvla.policies.paligemma.config import PaligemmaConfig, full_sizes, tiny_sizes


class Pi0Config(PaligemmaConfig):
    """Everything that fixes the shape and the conventions of a pi0 policy.

    Attributes:
        padded_state_dim: width of the state the network sees: the robot's numbers, then zeros.
        prompt: how the instruction becomes text: ``cleaned`` of underscores and line breaks
            (openpi), or ``as_given`` (LeRobot); a line break ends both.
    """

    family: Literal["pi0"] = "pi0"  # pyright: ignore[reportIncompatibleVariableOverride]
    padded_state_dim: int
    prompt: Literal["cleaned", "as_given"] = "cleaned"

    @model_validator(mode="after")
    def _state_must_fit(self) -> Pi0Config:
        if self.state_dim > self.padded_state_dim:
            raise ValueError(
                f"the robot's state has {self.state_dim} numbers, the network reads "
                f"{self.padded_state_dim}"
            )
        return self

    @classmethod
    def full(cls, horizon: int = 50, cameras: int = 3) -> Pi0Config:
        """The published 3.5 B-parameter policy."""
        return cls(**full_sizes(horizon, cameras), prompt_length=48, padded_state_dim=32)

    @classmethod
    def tiny(cls, vocabulary: int, *, horizon: int = 10, action_dim: int = 4) -> Pi0Config:
        """The same graph with about 5 M parameters and two 84-pixel cameras."""
        return cls(**tiny_sizes(vocabulary, horizon, action_dim), padded_state_dim=action_dim)
