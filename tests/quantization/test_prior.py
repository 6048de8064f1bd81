"""Inputs that calibration did not see: nothing is amplified for having been quiet."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omega_qvla.quantization.prior import SMALLEST_WEIGHT, expected_deviation, expected_size
from omega_qvla.quantization.transforms import smoothing_factors

SIZES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e4)), min_size=8, max_size=8)
COLUMNS = st.lists(st.floats(0.1, 10.0), min_size=8, max_size=8)


def weight_of(columns: list[float]) -> Tensor:
    """[4, 8] with these root mean squares of its columns."""
    signs = torch.ones(4, 8, dtype=torch.float64)
    signs[1::2] = -1.0
    return signs * torch.tensor(columns, dtype=torch.float64)


@settings(deadline=None)
@given(SIZES, COLUMNS, st.floats(0.0, 1.0))
def test_no_expected_deviation_stands_out_after_balancing(
    sizes: list[float], columns: list[float], alpha: float
) -> None:
    """d_j/c_j is at most the smoothed size of any channel, whatever calibration saw.

    With contributions v_k w_k ≥ d w for all k: d_j/c_j ≤ (d w)^(1-α) ≤ (v_k w_k)^(1-α) = v_k/c_k.
    """
    seen = torch.tensor(sizes, dtype=torch.float64)
    columns_of = torch.tensor(columns, dtype=torch.float64)
    deviation = expected_deviation(seen, columns_of)
    if not bool((seen > 0).any()):
        assert not bool(deviation.any())
        return
    later = expected_size(seen, deviation)
    factor = smoothing_factors(later, weight_of(columns), alpha)
    assert float((deviation / factor).max()) <= float((later / factor).min()) * (1 + 1e-6)


@settings(deadline=None)
@given(SIZES, COLUMNS, st.integers(0, 7), st.floats(1e-2, 1e2))
def test_the_prior_is_of_the_function_and_not_of_its_units(
    sizes: list[float], columns: list[float], channel: int, times: float
) -> None:
    """A channel times f and its column over f compute the same, and expect the same."""
    seen, weights = (torch.tensor(v, dtype=torch.float64) for v in (sizes, columns))
    scale = torch.ones(8, dtype=torch.float64)
    scale[channel] = times
    deviation = expected_deviation(seen, weights)
    rescaled = expected_deviation(seen * scale, weights / scale)
    torch.testing.assert_close(rescaled, deviation * scale, rtol=1e-9, atol=0.0)


def test_one_loud_channel_does_not_make_all_others_loud() -> None:
    """An outlier of 1e4 among 256 raises what the others expect by 1e4/256, not by 1e4/16."""
    seen = torch.ones(256)
    quiet = expected_deviation(seen, torch.ones(256))
    seen[7] = 1e4
    loud = expected_deviation(seen, torch.ones(256))
    assert torch.allclose(quiet, torch.ones(256, dtype=torch.float64))
    assert float(loud.max()) < 41


def test_columns_of_zeros_expect_no_more_than_balance_can_move() -> None:
    weights = torch.tensor([1.0, 0.0])
    found = expected_deviation(torch.ones(2), weights)
    assert float(found[1]) == 0.5 / SMALLEST_WEIGHT
    assert not bool(expected_deviation(torch.ones(2), torch.zeros(2)).any())


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-12, 1e-3))
def test_the_quieter_a_channel_was_the_less_its_balance_depends_on_it(size: float) -> None:
    seen = torch.ones(8, dtype=torch.float64)
    seen[3] = size
    weight = weight_of([1.0] * 8)
    later = expected_size(seen, expected_deviation(seen, torch.ones(8)))
    taken = smoothing_factors(seen, weight, 0.65)
    expected = smoothing_factors(later, weight, 0.65)
    assert float(taken[3] / taken[0]) < 0.02 and float(expected[3] / expected[0]) > 0.7
