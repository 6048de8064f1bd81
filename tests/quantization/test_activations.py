"""Activation scales: dynamic, searched, per channel, and interpolated over flow time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NonFiniteError
from omega_qvla.quantization.activations import (
    channel_quantile_scale,
    dequantize_activation,
    per_token_scale,
    quantize_activation,
    round_activations,
    static_scale_mse,
)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def squared_error(x: torch.Tensor, scale: float, bits: int) -> float:
    """Direct float64 evaluation, the oracle of the interval sums."""
    limit = 2 ** (bits - 1)
    x = x.double()
    return float(((x / scale).round().clamp(-limit, limit - 1) * scale - x).square().sum())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    exponent=st.integers(-44, 30),
)
def test_per_token_rounding_is_within_half_a_step(seed: int, bits: int, exponent: int) -> None:
    x = torch.randn(5, 17, generator=gen(seed)) * 10.0**exponent
    x[2] = 0.0
    scale = per_token_scale(x, bits)
    assert scale.shape == (5, 1) and bool((scale > 0).all())
    assert float(scale[2]) == 1.0
    q = quantize_activation(x, scale, bits)
    assert q.dtype == torch.int8
    assert torch.equal(q.float(), round_activations(x, scale, bits))
    error = (dequantize_activation(q, scale) - x).abs()
    ordinary = scale != 1.0
    assert torch.equal(per_token_scale(x, bits, 0.5)[ordinary], 0.5 * scale[ordinary])
    assert bool((error <= scale * 0.50001)[ordinary.expand_as(x)].all())


def test_ties_go_to_even_and_the_range_is_asymmetric() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0])
    assert quantize_activation(x, 1.0, 4).tolist() == [0, 2, 2, 0, -2, 7, -8]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    tail=st.floats(0.0, 2.5),
    exponent=st.integers(-20, 20),
)
def test_static_scale_is_close_to_the_best_of_a_dense_search(
    seed: int, bits: int, tail: float, exponent: int
) -> None:
    """From Gaussian to heavy-tailed samples; 2 % is the grid's granularity."""
    g = gen(seed)
    x = torch.randn(60, 20, generator=g) * (tail * torch.randn(60, 20, generator=g)).exp()
    x = x * 10.0**exponent
    scale = static_scale_mse(x, bits)
    largest = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    best = min(squared_error(x, largest * 10 ** (-r / 100), bits) for r in range(300))
    assert squared_error(x, scale, bits) <= best * 1.02


def test_static_scale_edge_cases() -> None:
    assert static_scale_mse(torch.zeros(4, 4), 4) == 1.0
    one = static_scale_mse(torch.tensor([[3.5]]), 4)
    assert squared_error(torch.tensor([[3.5]]), one, 4) < 1e-10
    negative = static_scale_mse(torch.tensor([[-8.0, 1.0, 2.0]]), 4)
    assert negative == pytest.approx(1.0, rel=0.02)
    with pytest.raises(ValueError, match="at least one sample"):
        static_scale_mse(torch.zeros(0, 4), 4)
    with pytest.raises(NonFiniteError, match="activations"):
        static_scale_mse(torch.tensor([[1.0, float("nan")]]), 4)


def test_static_scale_does_not_depend_on_the_order_of_samples() -> None:
    x = torch.randn(300, 8, generator=gen(1))
    shuffled = x[torch.randperm(300, generator=gen(2))]
    assert static_scale_mse(x, 4) == static_scale_mse(shuffled, 4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 60),
    quantile=st.floats(0.01, 1.0),
)
def test_channel_scale_is_the_quantile(seed: int, rows: int, quantile: float) -> None:
    x = torch.randn(rows, 6, generator=gen(seed))
    expected = torch.quantile(x.abs().double(), quantile, dim=0) / 7
    torch.testing.assert_close(
        channel_quantile_scale(x, quantile, 4).double(), expected, rtol=1e-5, atol=1e-7
    )


def test_channel_scale_of_silent_channels() -> None:
    x = torch.zeros(1000, 2)
    x[17, 1] = 14.0
    assert channel_quantile_scale(x, 0.5, 4).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="quantile"):
        channel_quantile_scale(x, 0.0, 4)
    with pytest.raises(ValueError, match="samples"):
        channel_quantile_scale(torch.zeros(0, 3), 0.9, 4)
    x[3, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"\[3, 0\]"):
        channel_quantile_scale(x, 0.5, 4)
