"""Which actions of a LeRobot checkpoint are relative, and files that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_formats import robot_observation

import omega_qvla as oq
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
NAMES = ["left_arm", "right_arm", "Gripper"]
CAMERAS = ("front", "wrist")

Write = Callable[..., Path]


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def change_step(path: Path, name: str, **settings: Any) -> None:
    def edit(content: dict[str, Any]) -> None:
        (step,) = (s for s in content["steps"] if s["registry_name"] == name)
        step["config"].update(settings)

    change(path, edit)


@pytest.fixture
def relative_directory(lerobot_directory: Write) -> Write:
    """Writes a pi05 checkpoint with relative actions, all three places agreeing."""

    def write(
        exclude: list[str], names: list[str] | None = NAMES, folder: str = "relative", **more: Any
    ) -> Path:
        directory = lerobot_directory(
            folder,
            use_relative_actions=True,
            relative_exclude_joints=exclude,
            action_feature_names=names,
            **more,
        )
        settings = {"exclude_joints": exclude, "action_names": names}
        change_step(directory / PRE, RELATIVE, enabled=True, **settings)
        change_step(directory / POST, ABSOLUTE, enabled=True)
        return directory

    return write


@pytest.mark.parametrize(
    ("exclude", "names", "mask", "said"),
    [
        ([], NAMES, (True, True, True), "relative to the state"),
        (["gripper"], NAMES, (True, True, False), "relative to the state, but Gripper"),
        (["gripper"], None, (True, True, True), "relative to the state"),
        (["ARM"], NAMES, (False, False, True), "relative to the state, but left_arm, right_arm"),
    ],
)
def test_the_state_is_added_to_the_actions_that_are_relative(
    exclude: list[str],
    names: list[str] | None,
    mask: tuple[bool, ...],
    said: str,
    relative_directory: Write,
    lerobot_directory: Write,
) -> None:
    policy = load_policy(relative_directory(exclude, names))
    assert policy.config.relative_actions == mask
    assert policy.decisions["actions"] == said
    observation = robot_observation(CAMERAS)
    noise = np.zeros(policy.noise_shape, np.float32)
    absolute = load_policy(lerobot_directory("absolute")).sample_actions(observation, noise)
    added = np.where(mask, observation["state"], np.float32(0.0))
    found = policy.sample_actions(observation, noise)
    np.testing.assert_array_equal(found, absolute + added.astype(np.float32))


def test_the_step_may_have_the_name_that_0_5_1_gave_it(relative_directory: Write) -> None:
    directory = relative_directory(["gripper"])
    text = (directory / PRE).read_text()
    (directory / PRE).write_text(text.replace(RELATIVE, "delta_actions_processor"))
    assert load_policy(directory).config.relative_actions == (True, True, False)


def test_a_quantized_artifact_adds_the_state_too(relative_directory: Write, tmp_path: Path) -> None:
    observation = robot_observation(CAMERAS)
    quantized = oq.quantize(load_policy(relative_directory(["gripper"])), [observation], "rtn")
    quantized.save_pretrained(tmp_path / "artifact")
    loaded = oq.load(tmp_path / "artifact")
    assert loaded.policy.decisions["actions"] == "relative to the state, but Gripper"
    noise = np.zeros(loaded.noise_shape, np.float32)
    other = {**observation, "state": observation["state"] + np.float32(0.5)}
    plain = [loaded.sample_normalized(o, noise).numpy() for o in (observation, other)]
    unnormalize = loaded.processor.statistics.actions.unnormalize
    for seen, chunk in zip((observation, other), plain, strict=True):
        state = np.where((True, True, False), seen["state"], 0.0)
        expected = unnormalize(chunk) + state.astype(np.float32)
        np.testing.assert_array_equal(loaded.sample_actions(seen, noise), expected)


@pytest.mark.parametrize("where", ["config", "pre", "post"])
def test_one_place_that_says_relative_alone_is_refused(
    where: str, lerobot_directory: Write
) -> None:
    directory = lerobot_directory()
    if where == "config":
        change(directory / "config.json", lambda c: c.update(use_relative_actions=True))
    elif where == "pre":
        change_step(directory / PRE, RELATIVE, enabled=True)
    else:
        change_step(directory / POST, ABSOLUTE, enabled=True)
    with pytest.raises(PolicyError, match="cannot be told"):
        load_policy(directory)


@pytest.mark.parametrize("where", ["config", "pre", "post"])
def test_one_place_that_says_absolute_alone_is_refused(
    where: str, relative_directory: Write
) -> None:
    directory = relative_directory(["gripper"])
    if where == "config":
        change(directory / "config.json", lambda c: c.update(use_relative_actions=False))
    elif where == "pre":
        change_step(directory / PRE, RELATIVE, enabled=False)
    else:
        change_step(directory / POST, ABSOLUTE, enabled=False)
    with pytest.raises(PolicyError, match="cannot be told"):
        load_policy(directory)


def test_a_missing_step_is_named(relative_directory: Write) -> None:
    directory = relative_directory([])

    def without(content: dict[str, Any]) -> None:
        content["steps"] = [s for s in content["steps"] if s["registry_name"] != ABSOLUTE]

    change(directory / POST, without)
    with pytest.raises(PolicyError, match=f"{ABSOLUTE} is not there"):
        load_policy(directory)


def test_two_sets_of_excluded_joints_are_refused(relative_directory: Write) -> None:
    directory = relative_directory(["gripper"])
    change_step(directory / PRE, RELATIVE, exclude_joints=["left"])
    with pytest.raises(PolicyError, match=r"makes actions 0, 1 relative.* the step .* 1, 2"):
        load_policy(directory)


def test_a_state_narrower_than_the_actions_is_refused(relative_directory: Write) -> None:
    directory = relative_directory([])
    narrow = {"type": "STATE", "shape": [2]}
    change(
        directory / "config.json",
        lambda c: c["input_features"].update({"observation.state": narrow}),
    )
    with pytest.raises(PolicyError, match="3 of them and 2 numbers of state"):
        load_policy(directory)
