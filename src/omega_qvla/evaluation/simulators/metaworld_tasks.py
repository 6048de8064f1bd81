"""The tasks of Meta-World that policies are evaluated on, and how they are seen.

Known without the simulator: names, instructions, ranges of the random start, and the two cameras.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

METAWORLD = "omega_qvla.evaluation.simulators.metaworld:MetaWorldEnv"
"""What ``pool.SimulatorPool`` calls to make one."""

ACTION_DIM = 4
STATE_DIM = 4
START_JITTER_M = (0.08, 0.05, 0.04)
"""Half-ranges, in metres, of the random offset of the hand's starting position."""


@dataclass(frozen=True)
class Task:
    """One benchmark task: what the policy is told, how long it may take, where things may be.

    ``low`` and ``high`` replace the simulator's own range of the random vector (metres; object
    position, then goal position where the task draws one); None keeps Meta-World's range.
    ``start_jitter`` scales the random offset of the hand's start.
    Tasks of the same ``scene`` look alike: only the instruction tells them apart.
    """

    instruction: str
    max_steps: int
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    scene: str = ""
    grasp: bool = False
    show_goal: bool = False
    start_jitter: float = 1.0


@dataclass(frozen=True)
class View:
    """A camera: distance (m) and angles (degrees) from the point it looks at.

    ``lookat`` is in the world, or, for the wrist view, relative to the hand.
    """

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


BASE_VIEW = View((0.0, 0.68, 0.08), 0.95, 112.0, -48.0)
WRIST_VIEW = View((0.0, 0.0, -0.05), 0.40, 60.0, -38.0)
FIELD_OF_VIEW = 45.0
"""Vertical field of view of both cameras, degrees (MuJoCo's default, asserted when rendering)."""


def project(points: Array, lookat: Array, view: View) -> Array:
    """World points [..., 3] → image coordinates [..., 2], right and down, in [0, 1] if visible."""
    azimuth, elevation = np.radians(view.azimuth), np.radians(view.elevation)
    level = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    forward = np.cos(elevation) * level + np.array([0.0, 0.0, np.sin(elevation)])
    right = np.array([level[1], -level[0], 0.0])
    offset = points - (lookat - view.distance * forward)
    scale = 0.5 / np.tan(np.radians(FIELD_OF_VIEW) / 2.0) / np.maximum(offset @ forward, 1e-3)
    across, down = offset @ right * scale, -(offset @ np.cross(right, forward)) * scale
    return np.stack((across, down), axis=-1) + 0.5


TASKS: dict[str, Task] = {
    "drawer-open-v3": Task(
        "open the drawer", 200, (-0.2, 0.9, 0.0), (0.2, 0.9, 0.0), scene="drawer"
    ),
    "door-open-v3": Task(
        "open the door",
        200,
        (0.06, 0.83, 0.15),
        (0.18, 0.95, 0.15),
        scene="door",
        start_jitter=0.6,
    ),
    "faucet-open-v3": Task(
        "turn the faucet open", 200, (-0.15, 0.72, 0.0), (0.15, 0.85, 0.0), scene="faucet"
    ),
    "faucet-close-v3": Task(
        "turn the faucet closed", 200, (-0.15, 0.72, 0.0), (0.15, 0.85, 0.0), scene="faucet"
    ),
    "push-v3": Task("push the puck to the goal", 200, show_goal=True, scene="puck"),
    "pick-place-v3": Task(
        "lift the puck to the goal", 200, grasp=True, show_goal=True, scene="puck"
    ),
}
"""The scripted experts solve at least 95 % of these over the ranges given."""
