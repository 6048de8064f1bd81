"""Meta-World tasks as a policy sees them: two camera views, proprioception and an instruction.

Meta-World (Yu et al., 2019; release 3) gives the physics, the scenes and the scripted experts. This
module adds what a benchmark for vision-language-action policies needs on a machine without a GPU:

* **two small views**: ``base``, fixed and framing the table, and ``wrist``, a camera whose centre
  follows the gripper, so that the last centimetres of a grasp become visual servoing;
* **fast software rendering**: multisampling, shadows, reflections and the arm's heavy meshes are
  off, which makes a view about ten times cheaper; the gripper, the objects and the goal stay;
* **episodes that are functions of their seed**: object, goal and start of the hand are drawn from
  one generator per episode, over ranges wider than Meta-World's own where the expert still works,
  so that a policy that cannot see cannot succeed.

Physics and rendering are apart: :meth:`MetaWorldEnv.step` never renders, so a chunk costs
its physics only.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import MissingPackageError, SimulatorUnavailable
from omega_qvla.evaluation.simulators.offscreen import OffscreenRenderer
from omega_qvla.extras import needing

Array = npt.NDArray[Any]
Observation = dict[str, Any]

ACTION_DIM = 4
STATE_DIM = 4
START_JITTER_M = (0.08, 0.05, 0.04)
"""Half-ranges, in metres, of the random offset of the hand's starting position."""

_RENDERING = (
    "the Meta-World simulator renders without a screen, with the Debian packages libegl1 and "
    "libgl1-mesa-dri (`apt-get install libegl1 libgl1-mesa-dri`)"
)
_HIDDEN_BODIES = frozenset(
    {"right_arm_base_link", "head", "right_hand", "pedestal", "torso", "screen"}
    | {"controller_box", "pedestal_feet", "right_l1_2"}
    | {f"right_l{index}" for index in range(7)}
)
_GRIPPER_GEOMS = frozenset({"rightpad_geom", "leftpad_geom", "rail", "rightclaw_it", "leftclaw_it"})
_RENDER_FLAGS_OFF = ("SHADOW", "REFLECTION", "SKYBOX", "FOG", "HAZE")


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


def _simulator() -> tuple[Any, Any]:
    """Import mujoco and the tasks' classes; a headless renderer is chosen before mujoco is."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    try:
        with warnings.catch_warnings(), needing("the Meta-World simulator", "sim"):
            warnings.simplefilter("ignore")
            return importlib.import_module("mujoco"), importlib.import_module("metaworld.env_dict")
    except (MissingPackageError, AttributeError, OSError, RuntimeError) as error:
        raise SimulatorUnavailable(f"{error}; {_RENDERING}") from error


class MetaWorldEnv:
    """One Meta-World task behind the observation format of the policies.

    Observations are ``{"images": {"base", "wrist"}, "state", "prompt"}`` with uint8 ``[H, W, 3]``
    images and float32 ``[4]`` state: hand position in metres, gripper opening from 0 to 1.
    """

    def __init__(self, task: str, image_size: int = 84) -> None:
        self.image_size = image_size
        self._mujoco, self._environments = _simulator()
        self._load(task)
        self._renderer = self._make_renderer()

    def turn_to(self, task: str) -> None:
        """Be another task from now on; the renderer, which is dear to make, stays.

        Raises:
            SimulatorUnavailable: the task is unknown; nothing has changed.
        """
        self._load(task)
        self._renderer.upload(self._env.model)

    def _load(self, task: str) -> None:
        """The physics of a task."""
        if task not in TASKS:
            raise SimulatorUnavailable(f"unknown task {task!r}; known: {', '.join(TASKS)}")
        self.task = task
        self._env: Any = self._environments.ALL_V3_ENVIRONMENTS[task]()
        # What `metaworld.MT1` and `set_task` would do, less the fifty goals that nobody asks for.
        self._env._set_task_called = True
        self._env._set_task_inner()
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._env._partially_observable = False
        del self._env.sawyer_observation_space  # a cached property that depends on it
        self._widen_ranges()
        self._hand_start: Array = np.array(self._env.hand_init_pos, dtype=np.float64)
        self._raw: Array = np.zeros(39)
        self._simplify_scene()
        self._options = self._mujoco.MjvOption()
        self._options.geomgroup[:] = [1, 1, 1, 0, 0, 0]
        self._options.sitegroup[:] = [1 if TASKS[task].show_goal else 0] * 6
        assert self._env.model.vis.global_.fovy == FIELD_OF_VIEW
        self._base, self._wrist = (_camera(self._mujoco, v) for v in (BASE_VIEW, WRIST_VIEW))

    @property
    def instruction(self) -> str:
        """The text a policy is given for this task."""
        return TASKS[self.task].instruction

    @property
    def max_steps(self) -> int:
        """Control steps after which an episode counts as failed."""
        return TASKS[self.task].max_steps

    @property
    def raw_observation(self) -> Array:
        """The simulator's own 39 numbers, which scripted experts read; never given to a policy."""
        return self._raw.copy()

    def reset(self, seed: int) -> Observation:
        """Start the episode that belongs to ``seed``; the same seed gives the same episode."""
        generator = np.random.default_rng(seed)
        jitter = generator.uniform(-1.0, 1.0, size=3) * np.array(START_JITTER_M)
        jitter *= TASKS[self.task].start_jitter
        self._env.hand_init_pos = self._hand_start + jitter
        self._mujoco.mj_resetData(self._env.model, self._env.data)
        self._env.np_random = np.random.default_rng(seed + 1)
        self._env.reset()
        # Meta-World moves bodies after computing their positions: what reset returns is stale.
        self._mujoco.mj_forward(self._env.model, self._env.data)
        self._raw = np.asarray(self._env._get_obs(), dtype=np.float64)
        return self.observe()

    def step(self, action: npt.ArrayLike) -> bool:
        """Run one control step; returns whether the task is solved now. Nothing is rendered."""
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        if clipped.shape != (ACTION_DIM,):
            raise ValueError(f"action has shape {clipped.shape}, expected ({ACTION_DIM},)")
        self._env.curr_path_length = 0
        raw, _, _, _, info = self._env.step(clipped)
        self._raw = np.asarray(raw, dtype=np.float64)
        return bool(info["success"] > 0)

    def observe(self) -> Observation:
        """Render both views of the present state."""
        return {
            "images": {"base": self._render(self._base), "wrist": self._render(self._follow())},
            "state": self._raw[:STATE_DIM].astype(np.float32),
            "prompt": self.instruction,
        }

    @contextmanager
    def undo(self) -> Iterator[None]:
        """Whatever happens inside the block is undone at its end: physics, time and observation."""
        mujoco, model, data = self._mujoco, self._env.model, self._env.data
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        saved = np.empty(mujoco.mj_stateSize(model, spec))
        mujoco.mj_getState(model, data, saved, spec)
        raw, previous = self._raw.copy(), np.array(self._env._prev_obs)
        try:
            yield
        finally:
            mujoco.mj_setState(model, data, saved, spec)
            mujoco.mj_forward(model, data)
            self._raw, self._env._prev_obs = raw, previous

    def close(self) -> None:
        """Free the renderer; the environment cannot be used afterwards."""
        self._renderer.close()

    def _widen_ranges(self) -> None:
        task, space = TASKS[self.task], self._env._random_reset_space
        if task.low is not None and task.high is not None:
            low, high = np.array(task.low), np.array(task.high)
            self._env._random_reset_space = type(space)(low, high, dtype=np.float64)

    def _simplify_scene(self) -> None:
        """Hide the arm's meshes (group 5), keep the gripper, reserve for nothing that is off."""
        model = self._env.model
        for index in range(model.ngeom):
            if model.body(model.geom_bodyid[index]).name in _HIDDEN_BODIES:
                model.geom_group[index] = 5
            if model.geom(index).name in _GRIPPER_GEOMS:
                model.geom_group[index] = 1
        quality, picture = model.vis.quality, model.vis.global_
        quality.offsamples = quality.shadowsize = 0  # a shadow map is 64 MB
        picture.offwidth = picture.offheight = self.image_size

    def _make_renderer(self) -> OffscreenRenderer:
        try:
            renderer = OffscreenRenderer(self._mujoco, self.image_size, _RENDER_FLAGS_OFF)
            renderer.upload(self._env.model)
        except Exception as error:  # the GL bindings raise many unrelated types here
            raise SimulatorUnavailable(f"{_RENDERING}: {error}") from error
        return renderer

    def _follow(self) -> Any:
        """Centre the wrist camera just below the fingers."""
        self._wrist.lookat[:] = self._raw[:3] + np.array(WRIST_VIEW.lookat)
        return self._wrist

    def _render(self, camera: Any) -> npt.NDArray[np.uint8]:
        return self._renderer.render(self._env.data, camera, self._options)


def _camera(mujoco: Any, view: View) -> Any:
    camera = mujoco.MjvCamera()
    camera.lookat[:] = view.lookat
    camera.distance, camera.azimuth, camera.elevation = view.distance, view.azimuth, view.elevation
    return camera
