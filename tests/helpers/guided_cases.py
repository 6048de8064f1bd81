"""What LeRobot and ours are guided with when their real-time chunking is compared.

Only numpy is imported here: the file is read in LeRobot's environment too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from lerobot_cases import ACTION_WIDTH, CASES, FLAT_DIMENSION, PROMPTS, statistics, uniform

GUIDED = tuple(
    case for case in CASES if case.name in ("saved-by-0.6.1", "four-steps", "relative-but-gripper")
)
"""The checkpoints: ten steps, four, and actions relative to the state."""


@dataclass(frozen=True)
class Setting:
    """One way to continue a chunk: LeRobot's ``RTCConfig``, and what one call brings."""

    schedule: str
    delay: int
    left: int
    execution_horizon: int = 10
    max_guidance_weight: float = 10.0

    @property
    def name(self) -> str:
        """Of its tensors."""
        return (
            f"{self.schedule}-{self.delay}-{self.left}-{self.execution_horizon}"
            f"-{self.max_guidance_weight:g}"
        )


SETTINGS = (
    Setting("linear", 2, 4),
    Setting("linear", 0, 3),
    Setting("exp", 1, 5),
    Setting("exp", 2, 4, execution_horizon=3, max_guidance_weight=2.5),
    Setting("ones", 1, 4, execution_horizon=3),
    Setting("zeros", 3, 4),
    Setting("linear", 4, 4),
)
STEP_TIMES = (*(1.0 - i / 10 for i in range(10)), 0.05, 0.001)
STEP_SHAPE = (2, 12, 6)
"""Of the tensors that LeRobot's processor is given without a network."""
STEP_SETTINGS = (
    *SETTINGS,
    Setting("exp", 3, 9, execution_horizon=8),
    Setting("linear", 5, 12, execution_horizon=20, max_guidance_weight=100.0),
    Setting("zeros", 0, 7),
    Setting("ones", 2, 12),
)


def previous(left: int) -> np.ndarray:
    """Left-overs in the robot's units, one per observation, [observations, left, actions]."""
    moved = statistics()["action"]
    drawn = uniform("previous", (len(PROMPTS), left, ACTION_WIDTH))
    actions = moved["mean"] + 0.5 * drawn * moved["std"]
    actions[..., FLAT_DIMENSION] = moved["mean"][FLAT_DIMENSION]
    return actions.astype(np.float32)


def step_tensors(setting: Setting) -> dict[str, np.ndarray]:
    """What one denoising step is given: noisy actions, a velocity, and a narrower left-over."""
    batch, _, width = STEP_SHAPE
    return {
        "x": uniform("step x", STEP_SHAPE).astype(np.float32),
        "v": uniform("step v", STEP_SHAPE).astype(np.float32),
        "previous": uniform("step previous", (batch, setting.left, width - 2)).astype(np.float32),
    }
