"""Actions relative to the state: which ones, the way back, and every path that samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.evaluation.openloop import sample_together
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Quantiles
from omega_qvla.policies.processing.relative_actions import relative_mask, to_absolute
from omega_qvla.serving.server.policy_engine import PolicyEngine

MASK = (True, False, True)
"""The last of four actions lies beyond the mask."""
NAMES = ("x", "Left_Gripper.pos", "gripperless", "yaw")

Make = Callable[..., Pi05Policy]


@pytest.fixture(scope="module")
def relative(make_small: Make) -> Pi05Policy:
    return make_small(relative_actions=MASK)


@pytest.mark.parametrize(
    ("names", "exclude", "expected"),
    [
        (NAMES, (), (True, True, True, True)),
        (NAMES, ("GRIPPER",), (True, False, False, True)),
        (NAMES, ("left_gripper.pos", "yaw"), (True, False, True, False)),
        (NAMES, ("",), (True, True, True, True)),
        (None, ("gripper",), (True, True, True, True)),
        (NAMES[:2], ("gripper",), (True, False, True, True)),
        ((*NAMES, "gripper"), ("gripper",), (True, False, False, True)),
    ],
)
def test_an_action_is_relative_unless_its_name_contains_an_excluded_word(
    names: tuple[str, ...] | None, exclude: tuple[str, ...], expected: tuple[bool, ...]
) -> None:
    assert relative_mask(4, names, exclude) == expected


@given(
    mask=st.lists(st.booleans(), max_size=6).map(tuple),
    more=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**32 - 1),
)
def test_relative_actions_return_to_the_absolute_ones_they_were_made_of(
    mask: tuple[bool, ...], more: tuple[int, int], seed: int
) -> None:
    """Small integers: sums are exact.  There are actions and state beyond the mask."""
    source = np.random.default_rng(seed)
    actions, states = len(mask) + more[0], len(mask) + more[1]
    absolute = source.integers(-1000, 1000, (5, actions)).astype(np.float32)
    state = source.integers(-1000, 1000, states).astype(np.float32)
    differences = absolute.copy()
    for i, relative in enumerate(mask):
        differences[:, i] -= state[i] if relative else 0.0
    kept = differences.copy()
    np.testing.assert_array_equal(to_absolute(differences, state, mask), absolute)
    np.testing.assert_array_equal(differences, kept)


def test_every_way_to_sample_adds_the_state_of_its_own_observation(
    relative: Pi05Policy, small_policy: Pi05Policy, few: Observations
) -> None:
    """Alone and batched, beside the same network with absolute actions.

    Batches order float32 sums otherwise: 1e-4 as in ``test_batches.py``.
    """
    noises = [np.full((4, 4), 0.1 * i, np.float32) for i in range(len(few))]
    wanted = []
    for observation, noise in zip(few, noises, strict=True):
        added = np.where((*MASK, False), observation["state"], np.float32(0.0))
        wanted.append(small_policy.sample_actions(observation, noise) + added)
        np.testing.assert_array_equal(relative.sample_actions(observation, noise), wanted[-1])
    encoded = [relative.encode(observation) for observation in few]
    for chunks in (
        relative.sample_batch(encoded, noises),
        sample_together(relative, list(few), noises),
    ):
        np.testing.assert_allclose(chunks, wanted, atol=1e-4)


def test_the_network_and_its_calibration_see_what_they_saw(
    relative: Pi05Policy, small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    """Normalized chunks are relative, as the network makes them; they are what errors are of."""
    assert torch.equal(
        relative.sample_normalized(few[0], noise), small_policy.sample_normalized(few[0], noise)
    )


def test_an_artifact_keeps_which_actions_are_relative(
    relative: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    quantized = oq.quantize(relative, few, recipe="rtn")
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out")
    assert loaded.policy.config.relative_actions == MASK
    wanted = quantized.sample_actions(few[0], noise)
    np.testing.assert_array_equal(loaded.sample_actions(few[0], noise), wanted)
    engine = PolicyEngine(loaded.policy)
    (served,) = engine.sample([engine.encode(few[0])], [noise])
    np.testing.assert_array_equal(served, wanted)
    assert not np.allclose(wanted[:, 0], quantized.policy.processor.decode(
        loaded.sample_normalized(few[0], noise), np.zeros(4, np.float32))[:, 0])  # fmt: skip


def test_a_description_from_before_relative_actions_means_absolute_ones(
    small_policy: Pi05Policy,
) -> None:
    config, files = small_policy.describe()
    del config["relative_actions"]
    assert Pi05Policy.skeleton(config, files).config.relative_actions == ()


def test_limits_of_relative_actions_contain_the_state_they_are_added_to(
    make_small: Make, few: Observations
) -> None:
    policy = make_small(relative_actions=MASK)
    statistics = NormalizationStatistics(
        state=Quantiles(q01=(-3.0, -3.0, -3.0, -3.0), q99=(5.0, 5.0, 5.0, 5.0)),
        actions=Quantiles(q01=(-1.0, -1.0, -1.0, -1.0), q99=(2.0, 2.0, 2.0, 2.0)),
    )
    policy.processor = Pi05Processor(policy.config, statistics, policy.processor.tokenizer)
    limits = PolicyEngine(oq.quantize(policy, few, recipe="rtn").policy).limits(0.0)
    np.testing.assert_allclose(limits.low, [-4.0, -1.0, -4.0, -1.0])
    np.testing.assert_allclose(limits.high, [7.0, 2.0, 7.0, 2.0])


def test_without_a_state_there_are_no_absolute_actions(make_small: Make, few: Observations) -> None:
    """Also where the prompt does not need the state."""
    policy = make_small(relative_actions=MASK, state_in_prompt=False)
    without = {key: value for key, value in few[0].items() if key != "state"}
    with pytest.raises(ObservationError, match="needs 'state'"):
        policy.sample_actions(without)
    with pytest.raises(ObservationError, match="needs 'state'"):
        policy.encode(without)
    with pytest.raises(PolicyError, match="relative to the state"):
        policy.processor.decode(torch.zeros(4, 4))


@pytest.mark.parametrize("changes", [{"state_dim": 2}, {"robot_action_dim": 2}])
def test_a_relative_action_needs_a_number_of_the_state(
    small_policy: Pi05Policy, changes: dict[str, int]
) -> None:
    config = small_policy.config.model_dump() | {"relative_actions": MASK} | changes
    with pytest.raises(ValidationError, match="3 actions may be relative"):
        type(small_policy.config).model_validate(config)
