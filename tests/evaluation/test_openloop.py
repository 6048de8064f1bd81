from __future__ import annotations

import numpy as np
import pytest

from omega_qvla.errors import NonFiniteError, ObservationError, PolicyError
from omega_qvla.evaluation.openloop import (
    draw_noises,
    error_shares,
    measure_reference,
    measure_row,
    relative_error,
    sample_chunks,
)


class Affine:
    """chunk = factor · observation + spread · noise, in robot units."""

    noise_shape = (2, 3)

    def __init__(self, factor=1.0, spread=0.0):
        self.factor, self.spread = factor, spread

    def sample_actions(self, observation, noise=None):
        return np.float32(self.factor * observation + self.spread * noise)


class Normalized(Affine):
    """Its robot units distort one dimension a thousandfold."""

    def sample_actions(self, observation, noise=None):
        return super().sample_actions(observation, noise) * np.float32([1, 1, 1000])

    def sample_normalized(self, observation, noise=None):
        return super().sample_actions(observation, noise)


def action_error(policy, reference, observations):
    """What a comparison does, with two noises per observation."""
    known = measure_reference(reference, observations, seed=0, noises=2)
    row = measure_row(policy, observations, seed=0, noises=2, normalized=known.normalized)
    return relative_error(row.chunks, known.chunks)


@pytest.fixture
def observations():
    generator = np.random.default_rng(3)
    return [generator.standard_normal((2, 3)) for _ in range(5)]


def test_error_of_a_scaled_policy_is_the_squared_relative_change(observations):
    # float32 chunks: relative rounding 6e-8 of the chunk is 1e-6 of a 10 % change
    assert action_error(Affine(1.1), Affine(), observations) == pytest.approx(0.01, rel=1e-5)
    assert action_error(Affine(), Affine(), observations) == 0.0


def test_error_pools_over_observations_instead_of_averaging_ratios():
    chunks, reference = [[[1.0]], [[10.0]]], [[[2.0]], [[10.0]]]
    assert relative_error(chunks, reference) == pytest.approx(1 / 104)
    assert error_shares(chunks, reference) == pytest.approx([1 / 104, 0])


def test_the_reference_decides_the_units(observations):
    """A hundredfold error in the distorted dimension shows in robot units only."""
    assert action_error(Normalized(1.1), Normalized(), observations) == pytest.approx(
        0.01, rel=1e-5
    )
    assert action_error(Normalized(1.1), Affine(), observations) > 100
    with pytest.raises(PolicyError, match="sample_normalized"):
        action_error(Affine(), Normalized(), observations)


def test_noise_floor_of_a_pure_noise_policy_is_about_two(observations):
    """E‖a - b‖² = 2 E‖b‖² for independent noises; 3000 numbers give a few percent."""
    policy = Affine(0.0, 1.0)
    assert measure_reference(policy, observations * 50, 0, 2).floor == pytest.approx(2.0, rel=0.1)


def test_noises_are_a_function_of_the_seed():
    assert np.array_equal(draw_noises(Affine(), 4, 9), draw_noises(Affine(), 4, 9))
    assert draw_noises(Affine(), 4, 9).dtype == np.float32
    assert not np.array_equal(draw_noises(Affine(), 4, 9), draw_noises(Affine(), 4, 10))


def test_bad_input_is_named(observations):
    noises = draw_noises(Affine(), 5, seed=0)
    with pytest.raises(ObservationError, match="at least one"):
        sample_chunks(Affine(), [], noises[:0], normalized=False)
    with pytest.raises(ObservationError, match="5 observations but 4 noises"):
        sample_chunks(Affine(), observations, noises[:4], normalized=False)
    broken = [*observations[:3], np.full((2, 3), np.nan), observations[4]]
    with pytest.raises(NonFiniteError, match="observation 3"):
        sample_chunks(Affine(), broken, noises, normalized=False)
    with pytest.raises(ValueError, match="zero everywhere"):
        relative_error(np.ones((1, 2, 3)), np.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="shape"):
        relative_error(np.ones((1, 2, 3)), np.ones((1, 2, 4)))


def test_a_policy_without_noise_shape_is_refused():
    class Silent(Affine):
        noise_shape = None

    with pytest.raises(PolicyError, match="noise_shape"):
        draw_noises(Silent(), 1, 0)
