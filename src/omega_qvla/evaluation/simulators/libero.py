"""LIBERO (Liu et al., NeurIPS 2023) as a policy sees it: the benchmark the paper reports.

Four suites of ten tasks with 50 recorded initial states each.  Tasks, instructions, initial states
and scenes are those of the installed ``libero`` package; none of them is stored here.  What this
module adds are the conventions under which published policies were trained and are evaluated:

| | openpi (pi0.5) | Isaac-GR00T N1.5 |
|---|---|---|
| source | ``examples/libero/main.py`` | ``examples/Libero/eval/run_libero_eval.py`` |
| views | 256 × 256, both turned by 180° | the same |
| state | hand position, axis-angle, two finger positions: 8 numbers | the same |
| settling | 10 steps of no motion, open gripper | the same |
| steps, then failure | 220, 280, 300, 520 | 220, 280, 600, 1000 |
| actions per chunk | 5 | 1 |
| gripper action | -1 opens, 1 closes: sent as it is | 1 opens, 0 closes: sign(1 - 2a) |
| simulator's seed | 7 | 0 |

Resizing to the network's input belongs to the policy's processor.  Turning an axis-angle vector
out of a quaternion (x, y, z, w) is 2 acos(w) · (x, y, z) / √(1 - w²), zero where w is ±1, as in
robosuite's ``transform_utils``.

**Two differences from those scripts.**  They seed the simulator once per task, so an episode
depends on those before it; here it is seeded before every episode, so that an episode is a function
of its initial state and may be run anywhere in any order.  And they count an exception as a
failure; here it is an error.  robosuite ends an episode after 1000 steps, settling included, which
leaves 990 of GR00T's 1000 for the long suite: there the original runs into that exception.

The libraries LIBERO needs cannot live beside this program's (docs/libero.md), so the simulator
usually runs in an interpreter of its own.  This module is what is imported there: it needs numpy,
gymnasium and LIBERO, and of ours only what has no requirements.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import string
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.environments import IS_SUCCESS
from omega_qvla.errors import SimulatorUnavailable
from omega_qvla.evaluation.simulators.libero_suites import (
    ACTION_DIM,
    IMAGE_SIZE,
    INITIAL_STATES,
    SETTLING_STEPS,
    SIMULATOR_STEPS,
    STATE_DIM,
    SUITES,
    TASKS_PER_SUITE,
    VIEWS,
    Gripper,
)
from omega_qvla.extras import needing

with needing("LIBERO's simulator", "libero"):
    import gymnasium
    from gymnasium import spaces

_REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
_OBJECTS = ("articulated_objects", "stable_hope_objects", "stable_scanned_objects")
_ASSETS = ("scenes", "textures", "turbosquid_objects", *_OBJECTS)
_INSTALL = (
    "LIBERO is not installed in {python}: make an environment for it as docs/libero.md says and "
    "name its interpreter as `simulator_python` ({error})"
)

Array = npt.NDArray[Any]


def axis_angle(quaternion: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rotation vector [3], radians, of a unit quaternion (x, y, z, w)."""
    given = np.asarray(quaternion, dtype=np.float64)
    w = float(np.clip(given[3], -1.0, 1.0))
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return given[:3] * (2.0 * math.acos(w) / sine)


def robot_state(raw: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Hand position (m), orientation (axis-angle, rad), finger positions (m): [8] float32."""
    parts = (raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"])
    return np.concatenate(parts).astype(np.float32)


def robot_action(action: npt.ArrayLike, gripper: Gripper) -> npt.NDArray[np.float64]:
    """A policy's action [7] as the simulator takes it: motion, then -1 to open, 1 to close.

    Raises:
        ValueError: another shape.
    """
    given = np.array(action, dtype=np.float64)
    if given.shape != (ACTION_DIM,):
        raise ValueError(f"action has shape {given.shape}, expected ({ACTION_DIM},)")
    if gripper == "opening":
        given[-1] = np.sign(1.0 - 2.0 * given[-1])
    return given


def upright(image: Array) -> npt.NDArray[np.uint8]:
    """A view turned by 180°, as the policies were trained on."""
    return np.ascontiguousarray(image[::-1, ::-1])


class LiberoEnv(gymnasium.Env[dict[str, Any], Array]):
    """One task of LIBERO; the reward is 1 where it is solved, which ends the episode, else 0.

    Args:
        task: ``suite:number``, see ``libero_suites.suite_tasks``; numbers are LIBERO's own order.
        cameras: names of the two views in the observation.
        gripper: ``signed`` is LIBERO's own action, ``opening`` 1 for open and 0 for closed.
        simulator_seed: of the simulator, before every episode.
        max_steps: by suite, settling not included.

    Raises:
        SimulatorUnavailable: LIBERO, its scenes or a renderer is missing; says which files.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium's own form

    def __init__(
        self,
        task: str,
        cameras: Sequence[str],
        gripper: Gripper,
        simulator_seed: int,
        max_steps: Mapping[str, int],
    ) -> None:
        self._suite, _, number = task.partition(":")
        self._gripper: Gripper = gripper
        self._seed = simulator_seed
        self._cameras = tuple(cameras)
        limit = SIMULATOR_STEPS - SETTLING_STEPS
        self.max_steps = min(max_steps[self._suite], limit)
        package = _locate()
        suite = _suite(SUITES[self._suite])
        described = suite.get_task(int(number))
        self.instruction = str(described.language)
        self._states = suite.get_task_init_states(int(number))
        if len(self._states) < INITIAL_STATES:
            raise SimulatorUnavailable(
                f"{package} has {len(self._states)} initial states of {task}, expected "
                f"{INITIAL_STATES}: install LIBERO again"
            )
        scene = package / "bddl_files" / described.problem_folder / described.bddl_file
        self._env = _open_scene(scene)
        self._raw: Mapping[str, Any] = {}
        self._steps = 0
        picture = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({name: picture for name in cameras}),
                "state": spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32),
                "prompt": spaces.Text(200, charset=string.printable),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin the episode of an initial state.

        Args:
            seed: number of the recorded initial state, 0 to 49; without it one is drawn.
            options: none are known.

        Raises:
            ValueError: there is no such state.
        """
        if seed is not None and not 0 <= seed < INITIAL_STATES:
            raise ValueError(f"initial state {seed} of {INITIAL_STATES}: LIBERO records no others")
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(INITIAL_STATES))
        self._env.seed(self._seed)
        self._env.reset()
        self._raw = self._env.set_init_state(self._states[seed])
        for _ in range(SETTLING_STEPS):
            self._raw = self._env.step(list(_REST))[0]
        self._steps = 0
        return self.observe(), {}

    def step(self, action: Array) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step, 50 ms, and both views after it."""
        terminated, truncated, info = self.advance(action)
        return self.observe(), float(info[IS_SUCCESS]), terminated, truncated, info

    def advance(self, action: npt.ArrayLike) -> tuple[bool, bool, dict[str, Any]]:
        """One control step: (terminated, truncated, info)."""
        self._raw, _, done, _ = self._env.step(robot_action(action, self._gripper).tolist())
        self._steps += 1
        return bool(done), self._steps >= self.max_steps, {IS_SUCCESS: bool(done)}

    def observe(self) -> dict[str, Any]:
        """Both views uint8 [256, 256, 3], the state and the instruction."""
        images = (upright(np.asarray(self._raw[view])) for view in VIEWS)
        return {
            "images": dict(zip(self._cameras, images, strict=True)),
            "state": robot_state(self._raw),
            "prompt": self.instruction,
        }

    def close(self) -> None:
        """Free the simulator; the environment cannot be used afterwards."""
        self._env.close()


def _locate() -> Path:
    """LIBERO's folder, ready to be imported.

    On its first import LIBERO asks on the terminal where to keep things; unless the user has
    answered that already, it is pointed to a configuration with its own defaults.
    """
    try:
        spec = importlib.util.find_spec("libero")
    except ValueError as error:
        raise SimulatorUnavailable(_missing(error)) from error
    if spec is None or not spec.submodule_search_locations:
        raise SimulatorUnavailable(_missing("no module named libero"))
    package = Path(next(iter(spec.submodule_search_locations))) / "libero"
    _require_assets(package)
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser()
    if not (folder / "config.yaml").exists():
        os.environ["LIBERO_CONFIG_PATH"] = _default_configuration(package)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])
    return package


def _require_assets(package: Path) -> None:
    """LIBERO would fetch them from a hub on its own, in the middle of an evaluation."""
    folder = package / "assets"
    missing = [name for name in _ASSETS if not (folder / name).is_dir()]
    if missing:
        raise SimulatorUnavailable(
            f"LIBERO's scenes and objects are missing: {folder} lacks {', '.join(missing)}. Get "
            "them with `hf download lerobot/libero-assets --repo-type dataset --local-dir "
            f"{folder}`, or link the folder libero/libero/assets of LIBERO's repository there"
        )


def _default_configuration(package: Path) -> str:
    """A folder with LIBERO's default configuration; JSON is YAML."""
    folders = {"benchmark_root": ".", "bddl_files": "bddl_files", "init_states": "init_files"}
    folders |= {"datasets": "../datasets", "assets": "assets"}
    content = {name: str(package / place) for name, place in folders.items()}
    folder = tempfile.mkdtemp(prefix="libero-")
    (Path(folder) / "config.yaml").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _suite(name: str) -> Any:
    """LIBERO's own description of a suite."""
    try:
        benchmark = importlib.import_module("libero.libero.benchmark")
    except ImportError as error:
        raise SimulatorUnavailable(_missing(error)) from error
    suite = benchmark.get_benchmark_dict()[name]()
    if suite.n_tasks != TASKS_PER_SUITE:
        raise SimulatorUnavailable(
            f"the installed LIBERO has {suite.n_tasks} tasks in {name}, expected {TASKS_PER_SUITE}"
        )
    return suite


def _open_scene(scene: Path) -> Any:
    """The simulator with both cameras, rendering without a screen."""
    try:
        environments = importlib.import_module("libero.libero.envs")
    except ImportError as error:
        raise SimulatorUnavailable(_missing(error)) from error
    try:
        return environments.OffScreenRenderEnv(
            bddl_file_name=str(scene), camera_heights=IMAGE_SIZE, camera_widths=IMAGE_SIZE
        )
    except FileNotFoundError as error:
        raise SimulatorUnavailable(
            f"a file of LIBERO's scenes is missing: {error}; see docs/libero.md for the assets"
        ) from error


def _missing(error: object) -> str:
    return _INSTALL.format(python=sys.executable, error=error)
