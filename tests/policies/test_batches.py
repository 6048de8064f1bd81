"""Several observations in one pass give what each gives alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError
from omega_qvla.policies.native import NativePolicy


def noises(count: int) -> list[np.ndarray]:
    source = np.random.default_rng(5)
    return [source.standard_normal((4, 4)).astype(np.float32) for _ in range(count)]


@pytest.fixture(params=["small_policy", "small_gr00t"])
def family(request: pytest.FixtureRequest) -> NativePolicy:
    return request.getfixturevalue(request.param)


def encoded(policy: Any, observations: Any) -> list[Any]:
    return [policy.encode(observation) for observation in observations]


def test_a_batch_gives_what_each_observation_gives_alone(
    family: NativePolicy, few: Observations
) -> None:
    """Float32 sums in another order: 1e-4 is a hundred times what is seen, and no action."""
    together = family.sample_batch(encoded(family, few), noises(3))
    for chunk, observation, noise in zip(together, few, noises(3), strict=True):
        np.testing.assert_allclose(chunk, family.sample_actions(observation, noise), atol=1e-4)


def test_observations_of_unequal_length_are_not_padded(
    family: NativePolicy, few: Observations
) -> None:
    """Another number of words or of cameras: a pass of its own, the order stays."""
    mixed = [
        few[0],
        {**few[1], "prompt": "press button"},
        {**few[2], "image_masks": {"wrist": False}, "images": {"base": few[2]["images"]["base"]}},
        few[1],
    ]
    together = family.sample_batch(encoded(family, mixed), noises(4))
    for chunk, observation, noise in zip(together, mixed, noises(4), strict=True):
        np.testing.assert_allclose(chunk, family.sample_actions(observation, noise), atol=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_what_a_robot_gets_does_not_depend_on_who_else_is_served(
    family: NativePolicy, few: Observations
) -> None:
    """Bit for bit, on one thread: rounding would make a step of 4 bits of the smallest noise."""
    quantized = oq.quantize(family, few, recipe="rtn")
    several = [few[number % 3] for number in range(9)]
    alone = [
        quantized.sample_actions(one, noise) for one, noise in zip(several, noises(9), strict=True)
    ]
    for count in (2, 4, 5, 9):
        together = quantized.sample_batch(encoded(quantized, several[:count]), noises(count))
        for chunk, single in zip(together, alone, strict=False):
            assert np.array_equal(chunk, single)


def test_a_batch_of_one_is_bit_for_bit_the_single_observation(
    family: NativePolicy, few: Observations
) -> None:
    (chunk,) = family.sample_batch(encoded(family, [few[0]]), noises(1))
    assert np.array_equal(chunk, family.sample_actions(few[0], noises(1)[0]))


def test_a_misshaped_noise_is_refused(family: NativePolicy, few: Observations) -> None:
    with pytest.raises(ObservationError, match=r"\[4, 4\]"):
        family.sample_batch(encoded(family, [few[0]]), [np.zeros((3, 4), np.float32)])
