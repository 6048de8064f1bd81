"""Several observations in one pass give what each gives alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

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
    return [policy.processor.encode(observation) for observation in observations]


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


def test_a_quantized_policy_runs_batches_on_its_integers(
    small_policy: NativePolicy, few: Observations
) -> None:
    """Rounding to integers makes jumps of float noise: one step of 4 bits is far above 1e-4."""
    quantized = oq.quantize(small_policy, few, recipe="rtn")
    together = quantized.sample_batch(encoded(quantized, few), noises(3))
    for chunk, observation, noise in zip(together, few, noises(3), strict=True):
        alone = quantized.sample_actions(observation, noise)
        assert np.square(chunk - alone).mean() < 1e-3 * np.square(alone).mean()


def test_a_batch_of_one_is_bit_for_bit_the_single_observation(
    family: NativePolicy, few: Observations
) -> None:
    (chunk,) = family.sample_batch(encoded(family, [few[0]]), noises(1))
    assert np.array_equal(chunk, family.sample_actions(few[0], noises(1)[0]))


def test_a_misshaped_noise_is_refused(family: NativePolicy, few: Observations) -> None:
    with pytest.raises(ObservationError, match=r"\[4, 4\]"):
        family.sample_batch(encoded(family, [few[0]]), [np.zeros((3, 4), np.float32)])
