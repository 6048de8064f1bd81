"""Weights fitted to rounded inputs, against least squares on the rounded inputs themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omega_qvla.quantization.activations import per_token_scale, round_activations
from omega_qvla.quantization.rotations import hadamard
from omega_qvla.quantization.rounded_inputs import fit_to_rounded, noise_share
from omega_qvla.quantization.weights import gptq
from omega_qvla.recipe import WeightScheme

WIDTH, OUTPUTS, ROWS = 64, 48, 20_000


def coloured(seed: int, rows: int = ROWS) -> Tensor:
    """Inputs [rows, K] whose energy falls off over three decades, rotated as a site's are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -3, WIDTH)
    return (torch.randn(rows, WIDTH, generator=generator) * sizes) @ hadamard(WIDTH, torch.float32)


def rounded(rows: Tensor) -> Tensor:
    scale = per_token_scale(rows, 4)
    return round_activations(rows, scale, 4) * scale


def weight(seed: int = 3) -> Tensor:
    return torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(seed))


def moment(rows: Tensor) -> Tensor:
    return rows.double().t() @ rows.double() / len(rows)


def output_error(stand_in: Tensor, exact: Tensor, rows: Tensor, seen: Tensor) -> float:
    wanted = rows.double() @ exact.double().t()
    got = seen.double() @ stand_in.double().t()
    return float((got - wanted).square().sum() / wanted.square().sum())


def test_it_is_the_least_squares_fit_to_rounded_inputs() -> None:
    """Oracle: numerical least squares on (x̂, x Wᵀ), of which only the noise's model is left out."""
    train, test = coloured(0), coloured(1)
    seen, w = rounded(train), weight()
    fitted, _, note = fit_to_rounded(w, moment(train), noise_share(train, seen))
    oracle = torch.linalg.lstsq(seen.double(), train.double() @ w.double().t()).solution.t()
    errors = [output_error(v, w, test, rounded(test)) for v in (w, fitted, oracle)]
    assert note is None
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 1.02 * errors[2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 2.0))
def test_it_is_the_minimum_of_its_objective(seed: int, share: float) -> None:
    """J at W* is not above J at any neighbour, and exceeds its own minimum as GPTQ assumes."""
    generator = torch.Generator().manual_seed(seed)
    rows, w = coloured(seed, 500), weight(seed)
    hessian, noise = moment(rows), share * noise_share(rows, rounded(rows))
    added = torch.diag(noise * hessian.diagonal())

    def objective(v: Tensor) -> float:
        left = (w - v).double()
        return float(((left @ hessian) * left).sum() + ((v.double() @ added) * v.double()).sum())

    fitted, total, _ = fit_to_rounded(w, hessian.clone(), noise)
    torch.testing.assert_close(total, hessian + added)
    step = 0.1 * torch.randn(w.shape, generator=generator)
    above = ((step.double() @ total) * step.double()).sum()
    lowest = objective(fitted)
    assert objective(fitted + step) == pytest.approx(lowest + float(above), rel=1e-3, abs=1e-6)


def test_without_noise_nothing_changes() -> None:
    rows, w = coloured(0, 500), weight()
    hessian = moment(rows)
    fitted, total, note = fit_to_rounded(w, hessian.clone(), torch.zeros(WIDTH))
    assert torch.equal(fitted, w) and torch.equal(total, hessian) and note is None


def test_a_channel_that_is_always_zero_stays_as_it_is() -> None:
    rows, w = coloured(0, 500), weight()
    rows[:, 5] = 0.0
    seen = rounded(rows)
    fitted, total, note = fit_to_rounded(w, moment(rows), noise_share(rows, seen))
    assert note is None and bool(torch.isfinite(fitted).all())
    assert float(total[5, 5]) == 0.0
    torch.testing.assert_close(fitted[:, 5], w[:, 5])


def test_a_hessian_without_a_factor_is_said() -> None:
    w, hessian = weight(), -torch.eye(WIDTH, dtype=torch.float64)
    fitted, _, note = fit_to_rounded(w, hessian, torch.zeros(WIDTH))
    assert torch.equal(fitted, w) and note is not None and "no factor" in note


def test_integers_fitted_to_rounded_inputs_are_closer_behind_them() -> None:
    """On other inputs than those fitted to."""
    train, test, w = coloured(0), coloured(1), weight()
    scheme = WeightScheme()
    plain = gptq(w, moment(train), scheme)
    target, hessian, _ = fit_to_rounded(w, moment(train), noise_share(train, rounded(train)))
    fitted = gptq(target, hessian, scheme)
    behind = [output_error(q.dequantize(), w, test, rounded(test)) for q in (plain, fitted)]
    assert behind[1] < 0.8 * behind[0]
