"""LIBERO: conventions against independent oracles, and the adapter against a stand-in simulator.

The stand-in imitates the calls of LIBERO's package and nothing else of it: these tests say that the
adapter asks the right things in the right order.  Nothing here is a LIBERO result.  Where the real
package and its scenes are installed the last test drives those; docs/libero.md says what it found.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

from omega_qvla.errors import PolicyError, SimulatorUnavailable
from omega_qvla.evaluation.rollout import rollout
from omega_qvla.evaluation.simulators.libero import LiberoEnv, axis_angle, robot_action
from omega_qvla.evaluation.simulators.libero_conventions import convention_of, environment_options
from omega_qvla.evaluation.simulators.libero_suites import (
    FACTORY,
    PROTOCOLS,
    SUITES,
    chosen_tasks,
    per_suite,
    suite_tasks,
)
from omega_qvla.evaluation.simulators.pool import SimulatorPool

CAMERAS = ["base", "wrist"]

BENCHMARK = """
from typing import NamedTuple

class Task(NamedTuple):
    language: str
    problem_folder: str
    bddl_file: str

class Suite:
    n_tasks = 10
    def __init__(self, name):
        self.name = name
    def get_task(self, i):
        return Task(f"do {i} of {self.name}", self.name, f"task_{i}.bddl")
    def get_task_init_states(self, i):
        return [[100.0 * i + n] for n in range(50)]

def get_benchmark_dict():
    names = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
    return {name: (lambda name=name: Suite(name)) for name in names}
"""

ENVIRONMENTS = '''
import numpy as np

LOG = []

class OffScreenRenderEnv:
    """Solved when the hand has moved one unit along x with the gripper closed."""
    def __init__(self, bddl_file_name, camera_heights, camera_widths):
        self.shape = (camera_heights, camera_widths, 3)
        LOG.append(("scene", bddl_file_name[-30:]))
    def seed(self, seed):
        LOG.append(("seed", seed))
    def reset(self):
        LOG.append(("reset",))
    def set_init_state(self, state):
        LOG.append(("state", float(state[0])))
        self.x, self.gripper = 0.0, -1.0
        return self.raw()
    def step(self, action):
        assert len(action) == 7 and all(isinstance(a, float) for a in action)
        LOG.append(("step", *action))
        self.x, self.gripper = self.x + action[0] / 4, action[6]
        return self.raw(), 0.0, self.x >= 1 and self.gripper == 1.0, {}
    def raw(self):
        image = np.zeros(self.shape, np.uint8)
        image[0, 0] = 9
        return {"agentview_image": image, "robot0_eye_in_hand_image": image + 1,
                "robot0_eef_pos": np.array([self.x, 2.0, 3.0]),
                "robot0_eef_quat": np.array([0.0, 0.0, 1.0, 0.0]),
                "robot0_gripper_qpos": np.array([0.04, -0.04])}
    def close(self):
        LOG.append(("close",))
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A package that is called like LIBERO's, on the import path of simulator processes too."""
    root = tmp_path / "libero" / "libero"
    for folder in ("benchmark", "envs"):
        (root / folder).mkdir(parents=True)
    for name in ("scenes", "textures", "articulated_objects", "turbosquid_objects"):
        (root / "assets" / name).mkdir(parents=True)
    for name in ("stable_hope_objects", "stable_scanned_objects"):
        (root / "assets" / name).mkdir()
    for folder in (root.parent, root):
        (folder / "__init__.py").write_text("")
    (root / "benchmark" / "__init__.py").write_text(BENCHMARK)
    (root / "envs" / "__init__.py").write_text(ENVIRONMENTS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "unanswered"))
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        del sys.modules[name]


def opened(task, family):
    """The environment of a task, as it is for a family."""
    return LiberoEnv(task, **environment_options(family, CAMERAS, 8, 7))


def log():
    return sys.modules["libero.libero.envs"].LOG


def rotation_matrix(vector):
    """Rodrigues' formula, as the exponential series of the cross-product matrix."""
    x, y, z = vector
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    term, total = np.eye(3), np.eye(3)
    for n in range(1, 40):
        term = term @ cross / n
        total = total + term
    return total


def test_the_rotation_vector_rotates_as_its_quaternion_does():
    generator = np.random.default_rng(0)
    for _ in range(50):
        x, y, z, w = quaternion = generator.standard_normal(4)
        quaternion /= np.linalg.norm(quaternion)
        x, y, z, w = quaternion
        expected = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
            ]
        )
        # the series of a rotation by up to 2π loses a few digits
        np.testing.assert_allclose(rotation_matrix(axis_angle(quaternion)), expected, atol=1e-9)


def test_no_rotation_is_zero_and_rounding_above_one_is_forgiven():
    assert np.array_equal(axis_angle([0, 0, 0, 1.0]), np.zeros(3))
    assert np.array_equal(axis_angle([0, 0, 0, -1.0000001]), np.zeros(3))
    np.testing.assert_allclose(axis_angle([0, 0, 1.0, 0]), [0, 0, np.pi])


def test_the_gripper_follows_the_family():
    action = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9])
    assert np.array_equal(robot_action(action, "signed"), action)
    opening = robot_action(action, "opening")
    assert np.array_equal(opening, [*action[:6], -1.0])
    assert robot_action([0] * 6 + [0.1], "opening")[-1] == 1.0
    assert action[-1] == 0.9
    with pytest.raises(ValueError, match=r"expected \(7,\)"):
        robot_action(np.zeros(6), "signed")


def test_suites_and_protocols_are_the_papers():
    assert len(suite_tasks("all")) == 40
    assert suite_tasks("long") == [f"long:{n}" for n in range(10)]
    assert len(suite_tasks("spatial, goal")) == 20
    assert len(suite_tasks("all")) * PROTOCOLS["paper"] == 400
    assert len(suite_tasks("goal")) * PROTOCOLS["full"] == 500
    with pytest.raises(PolicyError, match=r"'libero_90'.*spatial, object, goal, long or all"):
        suite_tasks("libero_90")
    assert chosen_tasks(["goal:3"]) == ["goal:3"] and chosen_tasks(None) == []
    with pytest.raises(PolicyError, match=r"'goal:10'.*spatial:0 to long:9"):
        chosen_tasks(["goal:1", "goal:10"])
    counts = {"goal:0": [3, 10], "goal:1": [4, 10], "long:0": [0, 10]}
    assert per_suite(counts) == {"goal": [7, 20], "long": [0, 10]}


def test_a_policy_of_another_robot_is_refused():
    options = environment_options("pi05", CAMERAS, 8, 7)
    assert options["cameras"] == CAMERAS and options["simulator_seed"] == 7
    assert options["gripper"] == "signed" and options["max_steps"]["long"] == 520
    with pytest.raises(PolicyError, match=r"has 3 \(a, b, c\), 8 and 7"):
        environment_options("pi05", ["a", "b", "c"], 8, 7)
    with pytest.raises(PolicyError, match="takes 7 action numbers"):
        environment_options("pi05", CAMERAS, 8, 32)
    with pytest.raises(PolicyError, match=r"'torch'.*pi05, pi0, gr00t_n15"):
        environment_options("torch", CAMERAS, 8, 7)


def test_an_episode_settles_from_its_recorded_state_with_the_familys_seed(stand_in):
    env = opened("goal:3", "pi05")
    observation, _ = env.reset(seed=7)
    assert log()[1:4] == [("seed", 7), ("reset",), ("state", 307.0)]
    assert log()[4:] == [("step", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)] * 10
    assert env.max_steps == 300 and observation["prompt"] == "do 3 of libero_goal"
    for name, value in (("base", 9), ("wrist", 10)):
        image = observation["images"][name]
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8
        assert image[255, 255, 0] == value and image.flags.c_contiguous  # turned by 180°
    expected = np.float32([0, 2, 3, 0, 0, np.pi, 0.04, -0.04])
    np.testing.assert_array_equal(observation["state"], expected)
    before = len(log())
    env.reset(seed=7)
    assert log()[before : before + 3] == log()[1:4]  # whatever ran in between
    for bad in (-1, 50):
        with pytest.raises(ValueError, match=f"initial state {bad} of 50"):
            env.reset(seed=bad)


def test_groot_opens_with_one_and_long_episodes_end_with_the_simulator(stand_in):
    env = opened("long:0", "gr00t_n15")
    env.reset(seed=0)
    assert ("seed", 0) in log()
    assert env.max_steps == 990  # robosuite's 1000 less the settling
    closing = [1.0, 0, 0, 0, 0, 0, 0.2]
    assert [env.advance(closing)[0] for _ in range(4)] == [False, False, False, True]
    assert log()[-1][-1] == 1.0
    assert {suite: opened(f"{suite}:0", "gr00t_n15").max_steps for suite in SUITES} == {
        **convention_of("gr00t_n15").max_steps,
        "long": 990,
    }


def test_episodes_run_in_simulator_processes(stand_in):
    class Reaching:
        noise_shape = (10, 7)

        def sample_actions(self, observation, noise=None):
            assert list(observation["images"]) == CAMERAS
            return np.tile(np.float32([1, 0, 0, 0, 0, 0, 1]), (10, 1))

    options = environment_options("pi05", CAMERAS, 8, 7)
    with SimulatorPool(1, "fake_environment:libero_without_torch", options) as pool:
        records = rollout(Reaching(), ["spatial:0", "object:9"], [0, 49], pool=pool)
    assert [(record.success, record.steps) for record in records] == [(True, 4)] * 4


def test_missing_scenes_are_named_with_how_to_get_them(stand_in):
    (stand_in / "assets" / "scenes").rmdir()
    told = r"lacks scenes\. Get them with `hf download lerobot/libero-assets"
    with pytest.raises(SimulatorUnavailable, match=told):
        opened("goal:0", "pi05")


def test_libero_is_not_let_ask_questions_on_a_terminal(stand_in, tmp_path, monkeypatch):
    opened("goal:0", "pi05")
    written = Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml"
    content = yaml.safe_load(written.read_text())
    assert content["init_states"] == str(stand_in / "init_files")
    answered = tmp_path / "answered"
    answered.mkdir()
    (answered / "config.yaml").write_text("{}")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(answered))
    opened("goal:0", "pi05")
    assert os.environ["LIBERO_CONFIG_PATH"] == str(answered)


def test_without_libero_the_environment_to_make_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libero", None)
    with pytest.raises(SimulatorUnavailable, match=r"`simulator_python`"):
        opened("goal:0", "pi05")


def test_an_interpreter_that_does_not_exist_is_named(point_policy):
    with (
        SimulatorPool(1, FACTORY, python="/no/such/python") as pool,
        pytest.raises(SimulatorUnavailable, match="/no/such/python"),
    ):
        rollout(point_policy(), ["goal:0"], [0], pool=pool)


@pytest.mark.skipif(
    find_spec("libero") is None, reason="LIBERO lives in an environment of its own: docs/libero.md"
)
def test_the_real_simulator_repeats_an_episode_to_the_bit():
    try:
        env = opened("spatial:0", "pi05")
    except SimulatorUnavailable as error:
        pytest.skip(str(error))
    first, second = env.reset(seed=3)[0], env.reset(seed=3)[0]
    np.testing.assert_array_equal(first["state"], second["state"])
    np.testing.assert_array_equal(first["images"]["base"], second["images"]["base"])
    env.close()
