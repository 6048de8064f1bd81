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

Physics and rendering are apart: :meth:`MetaWorldEnv.advance` never renders, so a chunk costs its
physics only (``environments.py``).
"""

from __future__ import annotations

import importlib
import os
import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.environments import IS_SUCCESS
from omega_qvla.errors import MissingPackageError, SimulatorUnavailable
from omega_qvla.evaluation.simulators.metaworld_tasks import (
    ACTION_DIM,
    BASE_VIEW,
    FIELD_OF_VIEW,
    START_JITTER_M,
    STATE_DIM,
    TASKS,
    WRIST_VIEW,
    Array,
    View,
)
from omega_qvla.evaluation.simulators.offscreen import OffscreenRenderer
from omega_qvla.extras import needing

with needing("the Meta-World simulator", "sim"):
    import gymnasium
    from gymnasium import spaces

Observation = dict[str, Any]

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


class MetaWorldEnv(gymnasium.Env[Observation, npt.NDArray[np.float32]]):
    """One Meta-World task behind the observation format of the policies.

    Observations are ``{"images": {"base", "wrist"}, "state", "prompt"}`` with uint8 ``[H, W, 3]``
    images and float32 ``[4]`` state: hand position in metres, gripper opening from 0 to 1.  The
    reward is 1 where the task is solved, which ends the episode, else 0.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(self, task: str, image_size: int = 84) -> None:
        self.image_size = image_size
        picture = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({"base": picture, "wrist": picture}),
                "state": spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32),
                "prompt": spaces.Text(80, charset=string.printable),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._steps = 0
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

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the episode that belongs to ``seed``; the same seed gives the same episode.

        Without a seed one is drawn by gymnasium's generator.  There are no options.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._steps = 0
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
        return self.observe(), {}

    def step(
        self, action: npt.NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One control step, and both views after it."""
        terminated, truncated, info = self.advance(action)
        return self.observe(), float(info[IS_SUCCESS]), terminated, truncated, info

    def advance(self, action: npt.ArrayLike) -> tuple[bool, bool, dict[str, Any]]:
        """One control step of which nothing is rendered: (terminated, truncated, info)."""
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        if clipped.shape != (ACTION_DIM,):
            raise ValueError(f"action has shape {clipped.shape}, expected ({ACTION_DIM},)")
        self._env.curr_path_length = 0
        raw, _, _, _, info = self._env.step(clipped)
        self._raw = np.asarray(raw, dtype=np.float64)
        self._steps += 1
        solved = bool(info["success"] > 0)
        return solved, self._steps >= self.max_steps, {IS_SUCCESS: solved}

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
        raw, previous, steps = self._raw.copy(), np.array(self._env._prev_obs), self._steps
        try:
            yield
        finally:
            mujoco.mj_setState(model, data, saved, spec)
            mujoco.mj_forward(model, data)
            self._raw, self._env._prev_obs, self._steps = raw, previous, steps

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
