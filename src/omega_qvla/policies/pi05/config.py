"""What fixes the shape and the conventions of a pi0.5 policy."""

from __future__ import annotations

from typing import Literal

from omega_qvla.policies.paligemma.config import PaligemmaConfig, full_sizes, tiny_sizes


class Pi05Config(PaligemmaConfig):
    """Everything that fixes the shape and the conventions of a pi0.5 policy.

    Attributes:
        state_in_prompt: whether the state is written into the prompt as 256-bin integers
            (openpi's ``discrete_state_input``).
        prompt_state_dim: width to which the normalized state is padded with zeros before it is
            written into the prompt (LeRobot: 32); None writes the robot's own dimensions (openpi).
    """

    family: Literal["pi05"] = "pi05"  # pyright: ignore[reportIncompatibleVariableOverride]
    state_in_prompt: bool
    prompt_state_dim: int | None = None

    @classmethod
    def full(cls, horizon: int = 50, cameras: int = 3) -> Pi05Config:
        """The published 3.6 B-parameter policy."""
        return cls(**full_sizes(horizon, cameras), prompt_length=200, state_in_prompt=True)

    @classmethod
    def tiny(cls, vocabulary: int, *, horizon: int = 10, action_dim: int = 4) -> Pi05Config:
        """The embedded policy: same graph, about 5 M parameters, two 84-pixel cameras."""
        return cls(**tiny_sizes(vocabulary, horizon, action_dim), state_in_prompt=True)

    @property
    def norms(self) -> int:
        """Adaptive norms of the expert: two per layer and the final one."""
        return 2 * self.depth + 1
