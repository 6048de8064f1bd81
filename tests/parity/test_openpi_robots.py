"""What robots send and get, against openpi's own transforms of every published configuration.

``tests/openpi/record_robots.py`` recorded them: the transforms that openpi's server would put
together, given the same statistics and the same output of a network.

Tolerance.  Images and prompts are equal.  openpi computes in float64, we round to float32 at the
end, and before adding a state: 1e-6 of values of order one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import tiny_official
from openpi_robots import CONFIGURATIONS, chunk, messages, statistics
from safetensors import safe_open

from omega_qvla.errors import ServingError
from omega_qvla.policies.paligemma.openpi import published_fields
from omega_qvla.policies.paligemma.openpi_training import TrainingConfig
from omega_qvla.policies.paligemma.sizes import Sizes
from omega_qvla.policies.pi0.checkpoints import openpi as pi0_openpi
from omega_qvla.policies.pi0.checkpoints import openpi_training as pi0_training
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi0.processing import Pi0Processor
from omega_qvla.policies.pi05.checkpoints import openpi as pi05_openpi
from omega_qvla.policies.pi05.checkpoints import openpi_training as pi05_training
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.tokenizers import ByteTokenizer
from omega_qvla.serving.server.policy_engine import PolicyEngine
from omega_qvla.serving.wire.specification import Request, parse_request

pytest.importorskip("msgpack", reason="the extra serve is not installed")

GOLDEN = Path(__file__).parent / "golden" / "openpi_robots.safetensors"
TOLERANCE = 1e-6
KNOWN = {**pi0_training.PUBLISHED.known, **pi05_training.PUBLISHED.known}
CASES = [(name, kind) for name in CONFIGURATIONS for kind in messages(name)]


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors, and what openpi's configurations say."""
    with safe_open(GOLDEN, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["told"])


def policy_of(name: str) -> Pi0Policy | Pi05Policy:
    """A policy of a published configuration, small and without weights."""
    training, text = KNOWN[name], json.dumps({"norm_stats": statistics()})
    small = tiny_official()
    sizes = Sizes(small.vision, small.backbone, small.expert, 2, 600, 32)
    fields = {**published_fields(training, sizes), "prompt_length": 400}
    if name.startswith("pi0_"):
        config = Pi0Config(**fields, padded_state_dim=32)
        stats = NormalizationStatistics.parse_means(text, name)
        return Pi0Policy.of_processor(Pi0Processor(config, stats, ByteTokenizer()))
    assert training.state_in_prompt is not None
    pi05 = Pi05Config(**fields, state_in_prompt=training.state_in_prompt)
    stats = NormalizationStatistics.parse(text, name)
    return Pi05Policy.of_processor(Pi05Processor(pi05, stats, ByteTokenizer()))


def request_of(policy: Pi0Policy | Pi05Policy, name: str, kind: str, **instead: str) -> Request:
    message = {**messages(name)[kind], **instead}
    return parse_request(message, PolicyEngine(policy).specification())


def test_every_published_configuration_of_a_robot_is_known() -> None:
    assert set(KNOWN) == set(CONFIGURATIONS)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_says_what_openpi_s_says(
    name: str, recorded: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    training: TrainingConfig = KNOWN[name]
    told = recorded[1][name]
    default = pi05_openpi.PROMPT_LENGTH if told["pi05"] else pi0_openpi.PROMPT_LENGTH
    assert {
        "pi05": name in pi05_training.PUBLISHED.known,
        "horizon": training.horizon,
        "action_dim": 32,
        "prompt_length": training.prompt_length or default,
        "state_in_prompt": bool(training.state_in_prompt),
        "asset_id": training.asset_id,
        "quantiles": name in pi05_training.PUBLISHED.known,
        "relative_actions": list(training.relative_actions),
        "adapt_to_pi": training.robot.adapt_to_pi,
        "metadata": {"reset_pose": list(training.robot.reset_pose)}
        if training.robot.reset_pose
        else {},
    } == {key: value for key, value in told.items() if key != "prompts"}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_a_robot_sends_becomes_what_openpi_makes_of_it(
    name: str, kind: str, recorded: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    tensors, told = recorded
    policy = policy_of(name)
    if told[name]["prompts"][kind] is None:
        with pytest.raises(ServingError, match="'prompt' must be a sentence"):
            request_of(policy, name, kind)
        return
    observation = request_of(policy, name, kind).observation
    assert observation["prompt"] == told[name]["prompts"][kind]
    stem = f"{name}/{kind}/image/"
    expected = {key.removeprefix(stem): t for key, t in tensors.items() if key.startswith(stem)}
    assert set(observation["images"]) == set(expected)
    for camera, image in expected.items():
        assert np.array_equal(observation["images"][camera], image)
    assert policy.processor.pixels(observation).shape[1] == len(expected)
    state = tensors[f"{name}/{kind}/state"]
    ours = policy.processor.normalized_state(observation)
    np.testing.assert_allclose(ours, state[: len(ours)], rtol=TOLERANCE, atol=TOLERANCE)
    assert not state[len(ours) :].any()
    if isinstance(policy, Pi0Policy):
        padded = policy.processor.encode(observation).state[0].numpy()
        np.testing.assert_allclose(padded, state, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_a_network_gives_becomes_the_actions_that_openpi_sends(
    name: str, kind: str, recorded: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    tensors, _ = recorded
    policy = policy_of(name)
    observation = request_of(policy, name, kind, prompt="any").observation
    processor = policy.processor
    actions = processor.decode(torch.from_numpy(chunk()), processor.anchor(observation))
    expected = tensors[f"{name}/{kind}/actions"]
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["pi0_aloha", "pi0_droid_jointpos_polaris"])
def test_limits_hold_what_the_robot_gets(name: str) -> None:
    """Actions at the ends of the statistics, from a state at its ends, are at the limits."""
    policy = policy_of(name)
    engine, processor = PolicyEngine(policy), policy.processor
    limits = engine.limits(0.0)
    assert (np.asarray(limits.low) <= np.asarray(limits.high)).all()
    ends = []
    for side in (-3.0, 3.0):
        width = policy.config.robot_action_dim
        found = processor.statistics
        state = np.asarray(found.state.mean[:width]) + side * np.asarray(found.state.std[:width])
        network = torch.full((1, 32), side)
        anchor = state.astype(np.float32) if any(processor.relative_actions) else None
        ends.append(processor.decode(network, anchor)[0])
    np.testing.assert_allclose(limits.low, np.minimum(*ends), atol=2e-5)
    np.testing.assert_allclose(limits.high, np.maximum(*ends), atol=2e-5)
