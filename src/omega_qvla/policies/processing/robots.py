"""Robots that openpi's published policies were trained for, and what their observations become.

openpi's training configurations carry conventions of the robot beside the network's: how a client
names things (``layout``, the server's), a prompt where none is sent, and, for ALOHA, other units.
pi0 was trained with joints and grippers as Physical Intelligence's own runtime has them; openpi
converts those of a standard ALOHA, both ways (``adapt_to_pi``):

* joints 1, 2, 8 and 9 turn the other way round;
* a gripper's position x in [0, 1] is linear between 0.01844 m (closed) and 0.05800 m (open) and
  becomes the angle of the motor's horn, φ = asin((h² + d² - a²)/(2 h d)) with h = 0.022 m the horn,
  a = 0.036 m the arm and d the position; then (φ - 0.5476)/(1.6296 - 0.5476);
* a predicted gripper angle g becomes (g + 0.5476 + 0.6213)/(1.4910 + 0.6213).

The two are no inverses of each other: observations are positions, actions are joint angles.

Source: openpi ``policies/aloha_policy.py``, ``training/config.py``; the numbers are Interbotix's
and ALOHA's.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

ALOHA_DIM = 14
"""Two arms of six joints and a gripper."""
_FLIPPED, _GRIPPERS = (1, 2, 8, 9), (6, 13)
_POSITION = (0.01844, 0.05800)
_ARM, _HORN = 0.036, 0.022
_MOTOR = (0.5476, 1.6296)
_JOINT = (-0.6213, 1.4910)


class Robot(BaseModel):
    """What openpi's training configuration says of the robot.

    Attributes:
        layout: how its client names observations; None for the policy's own names.
        adapt_to_pi: whether its joints and grippers are those of a standard ALOHA, which the
            network does not know.
        default_prompt: the instruction where an observation has none.
        reset_pose: joints of an arm at the start of an episode, told to the client.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    layout: Literal["aloha", "droid", "libero"] | None = None
    adapt_to_pi: bool = False
    default_prompt: str | None = None
    reset_pose: tuple[float, ...] = ()


@runtime_checkable
class HasRobot(Protocol):
    """A processor with conventions of a robot."""

    @property
    def robot(self) -> Robot:
        """What they are."""
        ...

    def robot_units(self, actions: np.ndarray) -> np.ndarray:
        """Absolute actions [..., A] of the network as the robot takes them, each by itself."""
        ...


def from_aloha(state: np.ndarray) -> np.ndarray:
    """The state of a standard ALOHA [14] in the network's units, float64.

    Args:
        state: as the robot sent it: near an open gripper the sine is flat, so that a rounding of
            the position to float32 alone is 3e-4 of the angle.
    """
    converted = _flip(state)
    grippers = converted[list(_GRIPPERS)]
    low, high = _POSITION
    distance = grippers * (high - low) + low
    sine = (_HORN**2 + distance**2 - _ARM**2) / (2 * _HORN * distance)
    angle = np.arcsin(np.clip(sine, -1.0, 1.0))
    converted[list(_GRIPPERS)] = (angle - _MOTOR[0]) / (_MOTOR[1] - _MOTOR[0])
    return converted


def to_aloha(actions: np.ndarray) -> np.ndarray:
    """Actions [..., 14] in the network's units as a standard ALOHA takes them, float32."""
    converted = _flip(actions)
    grippers = converted[..., _GRIPPERS] + _MOTOR[0]
    converted[..., _GRIPPERS] = (grippers - _JOINT[0]) / (_JOINT[1] - _JOINT[0])
    return converted.astype(np.float32)


def _flip(x: np.ndarray) -> np.ndarray:
    """A copy in float64, the joints that turn the other way round negated."""
    flipped = np.array(x, dtype=np.float64)
    flipped[..., _FLIPPED] *= -1.0
    return flipped
