"""Tables over flow time: exact at their times, linear between, flat beyond."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.flow_time import place

TIMES = [1.0, 0.75, 0.5, 0.25]
VALUES = torch.tensor([4.0, 1.0, 8.0, 6.0])


def at(t: float) -> float:
    return float(place(TIMES, t).of(VALUES))


def test_interpolation_is_exact_at_knots_linear_between_flat_beyond() -> None:
    assert [at(t) for t in TIMES] == VALUES.tolist()
    assert (at(0.875), at(0.3125)) == (2.5, 6.5)
    assert (at(1.5), at(0.0)) == (4.0, 6.0)
    assert float(place([1.0], 0.3).of(VALUES)) == 4.0


def test_times_stored_in_float32_are_still_knots() -> None:
    times = torch.tensor([1.0 - i / 10 for i in range(10)], dtype=torch.float32).tolist()
    values = torch.rand(10, 3, generator=torch.Generator().manual_seed(3))
    for i in range(10):
        found = place(times, 1.0 - i / 10).of(values)
        assert torch.equal(found, values[i]) and found.data_ptr() == values[i].data_ptr()


@settings(max_examples=40, deadline=None)
@given(t=st.floats(-1.0, 2.0))
def test_interpolated_values_lie_between_those_of_their_neighbours(t: float) -> None:
    low, high, share = place(TIMES, t)
    assert 0.0 <= share <= 1.0 and low - high in (0, 1)
    assert min(VALUES[low], VALUES[high]) <= at(t) <= max(VALUES[low], VALUES[high])


def test_a_time_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        place(TIMES, float("nan"))
