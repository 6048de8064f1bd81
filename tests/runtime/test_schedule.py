"""What a layer rounds its inputs with, over flow time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import PolicyError
from omega_qvla.runtime.schedule import Schedule, StepValues

TIMES = torch.tensor([1.0, 0.7, 0.4, 0.1])


def table(width: int = 5, outputs: int = 3) -> StepValues:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(4, generator=generator) + 0.1
    offset, bias = (torch.randn(4, size, generator=generator) for size in (width, outputs))
    return StepValues(scale, offset, bias)


@settings(deadline=None)
@given(st.floats(-0.5, 1.5))
def test_everything_is_interpolated_together_as_numpy_does(time: float) -> None:
    values, given_out = table(), Schedule(TIMES, table()).at(time)
    knots = TIMES.double().numpy()[::-1]
    for found, column in zip(given_out.tensors(), values.tensors(), strict=True):
        rows = column.double().numpy().reshape(4, -1)[::-1]
        wanted = [np.interp(time, knots, rows[:, i]) for i in range(rows.shape[1])]
        assert np.allclose(found.double().numpy().reshape(-1), wanted, atol=1e-4)


def test_calibrated_times_get_their_rows_without_a_copy() -> None:
    values = table()
    schedule = Schedule(TIMES, values)
    for row, time in enumerate((1.0, 0.7, 0.4, 0.1)):  # float64, stored in float32
        now = schedule.at(time)
        assert values.offset is not None and now.offset is not None
        assert now.offset.data_ptr() == values.offset[row].data_ptr()


def test_a_layer_without_steps_needs_no_time_and_one_with_steps_does() -> None:
    assert Schedule(None).at(None) == StepValues()
    single = Schedule(torch.tensor([1.0]), StepValues(torch.tensor([0.5])))
    assert single.at(None).scale == 0.5 and single.at(0.3).scale == 0.5
    with pytest.raises(PolicyError, match=r"clock\.step\(i, t\)"):
        Schedule(TIMES, table()).at(None)


def test_what_is_remembered_is_bounded_in_number_and_in_bytes() -> None:
    for width, most in ((5, 256), (1 << 20, 16)):
        schedule = Schedule(TIMES, table(width))
        given_out = []
        for number in range(300 if width == 5 else 40):
            given_out.append(schedule.at(0.4 + 0.3 * (number + 0.5) / 300).scale)
            assert len(schedule.known()) <= 3 * most
        assert all(scale is not None for scale in given_out)
