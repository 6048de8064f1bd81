"""The Meta-World environment: episodes are functions of their seed, views show what matters."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from omega_qvla.errors import OmegaError, SimulatorUnavailable
from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS

# Importing metaworld here would load mujoco before the environment has chosen its renderer.
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("metaworld") is None, reason="the simulator is an optional extra"),
]

TASK = "push-v3"

DIGEST = """
import hashlib, numpy as np
from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
env = MetaWorldEnv({tasks}[0])
for task in {tasks}[1:]:
    env.reset(seed=3)
    env.turn_to(task)
digest = hashlib.sha256()
for seed in {seeds}:
    observation, _ = env.reset(seed=seed)
    for step in range(6):
        env.advance(np.full(4, 0.3 - 0.1 * step, np.float32))
    if seed == 4:
        observation = env.observe()
        digest.update(observation["state"].tobytes())
        digest.update(env.raw_observation.tobytes())
        for image in observation["images"].values():
            digest.update(image.tobytes())
env.close()
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def env():
    try:
        environment = MetaWorldEnv(TASK)
    except SimulatorUnavailable as error:
        pytest.skip(str(error))
    yield environment
    environment.close()


PICTURES = """
import mujoco, numpy as np
from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
env = MetaWorldEnv("drawer-open-v3")
env.turn_to("push-v3")
ours = env.reset(seed=4)[0]["images"]
env._renderer.close()
model = env._env.model
model.vis.quality.shadowsize, model.vis.global_.offwidth = 4096, 640
theirs = mujoco.Renderer(model, 84, 84)
for name in ("SHADOW", "REFLECTION", "SKYBOX", "FOG", "HAZE"):
    theirs.scene.flags[getattr(mujoco.mjtRndFlag, "mjRND_" + name)] = 0
for name, camera in (("base", env._base), ("wrist", env._follow())):
    theirs.update_scene(env._env.data, camera=camera, scene_option=env._options)
    assert np.array_equal(theirs.render(), ours[name]), name
theirs.close()
print("equal")
"""


def run(program: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def digest(seeds: list[int], tasks: list[str]) -> str:
    return run(DIGEST.format(seeds=seeds, tasks=tasks))


def test_an_observation_has_two_views_a_state_and_the_instruction(env):
    observation, _ = env.reset(seed=0)
    assert set(observation["images"]) == {"base", "wrist"}
    for image in observation["images"].values():
        assert image.shape == (84, 84, 3) and image.dtype == np.uint8
        assert image.std() > 10  # something is drawn: neither black nor one colour
    assert observation["state"].shape == (4,) and observation["state"].dtype == np.float32
    assert observation["prompt"] == TASKS[TASK].instruction == env.instruction


@pytest.mark.usefixtures("env")
def test_the_same_seed_is_the_same_episode_in_another_process_and_after_other_episodes():
    assert digest([4], [TASK]) == digest([9, 2, 4], [TASK])


@pytest.mark.usefixtures("env")
def test_an_environment_that_was_other_tasks_gives_the_same_episodes_to_the_last_pixel():
    assert digest([4], [TASK]) == digest([4], ["door-open-v3", TASK, "drawer-open-v3", TASK])


@pytest.mark.usefixtures("env")
def test_pictures_are_those_of_mujocos_own_renderer():
    """With the shadow map and the larger buffer that ours does without."""
    assert run(PICTURES) == "equal"


def test_different_seeds_place_the_objects_and_the_hand_differently(env):
    layouts = []
    for seed in range(5):
        env.reset(seed=seed)
        raw = env.raw_observation
        layouts.append(np.concatenate((raw[:3], raw[4:7], raw[-3:])))
    assert np.std(layouts, axis=0).max() > 0.02
    assert len({tuple(row) for row in np.round(layouts, 4)}) == 5


def test_undo_restores_the_simulator_exactly(env):
    env.reset(seed=7)
    before = env.observe()
    with env.undo():
        for _ in range(10):
            env.advance(np.array([1.0, 0.5, -1.0, 1.0], np.float32))
        moved = env.observe()
    after = env.observe()
    assert not np.array_equal(before["state"], moved["state"])
    assert np.array_equal(before["state"], after["state"])
    assert np.array_equal(before["images"]["wrist"], after["images"]["wrist"])


def test_the_future_is_the_same_with_and_without_an_undone_excursion(env):
    def final(excursion: bool) -> np.ndarray:
        env.reset(seed=11)
        for _ in range(5):
            env.advance(np.array([0.2, 0.4, -0.8, -1.0], np.float32))
        if excursion:
            with env.undo():
                for _ in range(8):
                    env.advance(np.ones(4, np.float32))
        for _ in range(10):
            env.advance(np.array([0.1, 0.9, -0.3, 1.0], np.float32))
        return env.raw_observation

    # Not to the last bit: restoring runs the solver once more, from a warmer start.
    np.testing.assert_allclose(final(False), final(True), rtol=0, atol=1e-9)


def test_the_wrist_view_moves_with_the_hand(env):
    env.reset(seed=3)
    before = env.observe()["images"]
    for _ in range(15):
        env.advance(np.array([1.0, 0.0, 0.0, 0.0], np.float32))
    after = env.observe()["images"]
    change = {c: np.abs(after[c].astype(int) - before[c]).mean() for c in ("base", "wrist")}
    assert change["wrist"] > change["base"] > 0


def test_an_action_of_the_wrong_shape_is_refused(env):
    with pytest.raises(ValueError, match=r"expected \(4,\)"):
        env.advance(np.zeros(3, np.float32))


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(OmegaError, match=TASK):
        MetaWorldEnv("juggle-v3")


def test_turning_to_an_unknown_task_changes_nothing(env):
    before, _ = env.reset(seed=5)
    with pytest.raises(OmegaError, match=TASK):
        env.turn_to("juggle-v3")
    again, _ = env.reset(seed=5)
    assert env.task == TASK and np.array_equal(before["images"]["base"], again["images"]["base"])


def test_gymnasiums_own_checker_accepts_it(env):
    """What a step returns is what it returned before; nothing in the spaces is out of place."""
    from gymnasium.utils.env_checker import check_env

    check_env(env, skip_render_check=True, skip_close_check=True)


def test_a_step_renders_and_ends_the_episode_when_its_time_is_over(env):
    env.reset(seed=1)
    for number in range(TASKS[TASK].max_steps):
        terminated, truncated, info = env.advance(np.zeros(4, np.float32))
        assert (terminated, truncated) == (False, number == TASKS[TASK].max_steps - 1)
        assert info == {"is_success": False}
    env.reset(seed=1)
    observation, reward, terminated, truncated, _ = env.step(np.zeros(4, np.float32))
    assert env.observation_space.contains(observation)
    assert (reward, terminated, truncated) == (0.0, False, False)
