"""Streamed statistics equal those of all rows at once, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from omega_qvla.calibration.capture import SAMPLE_ROWS, RowSample, SiteStatistics, capture
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite, Stage

ONCE = QuantizationSite("once", ("once",), "backbone")
STEPPED = QuantizationSite("stepped", ("stepped",), "action_head", per_step=True)


def statistics(site: QuantizationSite = ONCE, width: int = 6) -> SiteStatistics:
    return SiteStatistics(site, width, torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_streamed_second_moment_equals_the_batch_one(sizes: list[int], seed: int) -> None:
    rows = torch.randn(sum(sizes), 6, generator=torch.Generator().manual_seed(seed)) * 30
    seen, clock = statistics(), FlowClock()
    for part in rows.split(sizes):
        seen.update(part.unsqueeze(0), clock, 0)
    exact = rows.double()
    assert seen.count == len(rows)
    # Both are float64 sums of the same products in another order.
    assert torch.allclose(seen.second_moment, exact.T @ exact, rtol=1e-12, atol=1e-9)
    assert torch.allclose(seen.rms, exact.square().mean(0).sqrt().float(), rtol=1e-6)
    assert torch.equal(seen.rows(0), rows)
    assert torch.equal(seen.maxima, rows.abs().amax(0))


def test_equal_tokens_count_the_same_whatever_their_size() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6, generator=generator)
    sizes = 10.0 ** torch.randint(-3, 4, (20, 1), generator=generator)
    found = []
    for stream in (rows, rows * sizes):
        seen = SiteStatistics(ONCE, 6, torch.Generator().manual_seed(0), equal_tokens=True)
        seen.update(stream, FlowClock(), 0)
        found.append(seen)
    torch.testing.assert_close(found[0].second_moment, found[1].second_moment, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].rows(0), found[1].rows(0))
    # Each row adds the width to the trace.
    assert float(found[1].second_moment.trace()) == pytest.approx(6 * 20, rel=1e-5)
    seen.update(torch.zeros(2, 6), FlowClock(), 1)
    assert torch.isfinite(seen.second_moment).all() and seen.count == 22


def test_the_row_sample_is_bounded_and_uniform_whatever_the_block_size() -> None:
    """Every tenth of the stream gets its share: a binomial count, five deviations allowed."""
    total = 10 * SAMPLE_ROWS
    stream = torch.arange(total, dtype=torch.float32).unsqueeze(1)
    for block in (97, 1500, total):
        sample = RowSample(torch.Generator().manual_seed(3))
        for part in stream.split(block):
            sample.add(part)
            assert sample.rows is not None and len(sample.rows) <= SAMPLE_ROWS
        assert sample.rows is not None
        kept = sample.rows.squeeze(1)
        assert len(kept) == SAMPLE_ROWS and len(kept.unique()) == SAMPLE_ROWS
        shares = torch.bincount((kept // SAMPLE_ROWS).long(), minlength=10)
        deviation = (SAMPLE_ROWS * 0.1 * 0.9) ** 0.5
        assert (shares - SAMPLE_ROWS / 10).abs().max() < 5 * deviation


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=8),
    looks=st.sets(st.integers(0, 7)),
    seed=st.integers(0, 99),
)
def test_the_rows_with_the_smallest_keys_are_kept_in_the_order_of_the_stream(
    sizes: list[int], looks: set[int], seed: int
) -> None:
    """All rows and keys at once are the oracle, whenever someone looks in between."""
    stream = torch.arange(sum(sizes), dtype=torch.float32).unsqueeze(1)
    drawn = torch.Generator().manual_seed(seed)
    keys = torch.cat([torch.rand(n, generator=drawn, dtype=torch.float64) for n in sizes])
    sample = RowSample(torch.Generator().manual_seed(seed))
    for number, part in enumerate(stream.split(sizes)):
        sample.add(part)
        if number in looks:
            assert sample.rows is not None and len(sample.rows) <= SAMPLE_ROWS
    kept = keys.argsort()[:SAMPLE_ROWS].sort().values
    assert sample.rows is not None and torch.equal(sample.rows, stream[kept])
    sample.shift(torch.tensor([2.0]))
    assert torch.equal(sample.rows, stream[kept] - 2.0)


def test_the_row_sample_does_not_keep_the_callers_memory() -> None:
    sample, rows = RowSample(torch.Generator().manual_seed(0)), torch.ones(3, 2)
    sample.add(rows)
    rows.zero_()
    assert sample.rows is not None and bool((sample.rows == 1).all())


def test_steps_are_kept_apart_with_their_times() -> None:
    seen, clock = statistics(STEPPED, 2), FlowClock()
    for step in (1, 0):
        with clock.step(step, 1.0 - step / 2):
            seen.update(torch.full((3, 2), float(step)), clock, 0)
    assert seen.steps == [0, 1] and seen.times == {0: 1.0, 1: 0.5}
    assert bool((seen.rows(1) == 1).all()) and seen.rows(0).shape == (3, 2)


def test_a_per_step_site_outside_any_step_is_refused_with_the_remedy() -> None:
    with pytest.raises(PolicyError, match=r"'stepped'.*clock\.step\(i, t\).*step_module"):
        statistics(STEPPED, 2).update(torch.ones(1, 2), FlowClock(), 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_input_is_located_and_not_folded_in(bad: float) -> None:
    seen, clock = statistics(STEPPED, 2), FlowClock()
    with clock.step(3, 0.4), pytest.raises(NonFiniteError, match="observation 7, denoising step 3"):
        seen.update(torch.tensor([[1.0, bad]]), clock, 7)
    assert seen.count == 0 and bool((seen.second_moment == 0).all())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.stepped = nn.Linear(2, 2), nn.Linear(2, 2)


def test_capture_removes_its_hooks_and_numbers_observations_as_asked() -> None:
    module, clock = Two(), FlowClock()
    stage = Stage("all", lambda state: {"y": module.once(state["x"])}, (ONCE,))
    states = [{"x": torch.ones(1, 2)}, {"x": torch.full((1, 2), float("nan"))}]
    with pytest.raises(NonFiniteError, match="observation 9"):
        capture(stage, states, [ONCE], module, clock, lambda _: 0, numbers=[4, 9])
    assert not module.once._forward_pre_hooks
    found, _ = capture(stage, states[:1], [ONCE], module, clock, lambda _: 0)
    assert found["once"].count == 1 and not module.once._forward_pre_hooks


def test_a_site_that_is_never_called_is_refused_by_name() -> None:
    module = Two()
    stage = Stage("all", lambda state: {"y": module.once(state["x"])}, (ONCE, STEPPED))
    with pytest.raises(PolicyError, match="'stepped' was never called"):
        capture(stage, [{"x": torch.ones(1, 2)}], [STEPPED], module, FlowClock(), lambda _: 0)
