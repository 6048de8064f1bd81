"""Maps of one block: known answers for DuQuant's greedy rotation and WUSH's closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omega_qvla.errors import NonFiniteError
from omega_qvla.quantization.rotations import (
    cosines,
    greedy_rotation,
    hadamard,
    second_moment_map,
    shrunk,
)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moment(rows: Tensor) -> Tensor:
    return rows.t() @ rows


@pytest.mark.parametrize("n", [1, 2, 12, 64])
def test_cosines_are_orthogonal_with_a_flat_first_row(n: int) -> None:
    matrix = cosines(n)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(matrix[0], torch.full((n,), n**-0.5, dtype=torch.float64))


def test_one_greedy_turn_spreads_a_lone_outlier_evenly() -> None:
    """By hand: the channel 5 of size 8 in a block of 16 becomes 16 channels of 8/√16 = 2."""
    rows = torch.zeros(1, 16)
    rows[0, 5] = 8.0
    turned = rows.double() @ greedy_rotation(rows, steps=1)
    torch.testing.assert_close(turned, torch.full((1, 16), 2.0, dtype=torch.float64))


def test_the_greedy_rotation_is_orthogonal_and_never_raises_the_peak() -> None:
    rows = torch.randn(200, 64, generator=gen(0))
    rows[:, [3, 40]] *= 50
    rotation = greedy_rotation(rows)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(64, dtype=torch.float64))
    peaks = [
        float((rows.double() @ greedy_rotation(rows, steps=n)).abs().max()) for n in (0, 1, 4, 64)
    ]
    assert peaks[0] == float(rows.abs().max())
    assert peaks == sorted(peaks, reverse=True)
    # Two channels of 50 σ over 64: at best 50 · √2 / √64 ≈ 9 σ a channel, before their maximum.
    assert peaks[-1] < peaks[0] / 3


def test_rows_that_are_flat_already_are_left_alone() -> None:
    torch.testing.assert_close(greedy_rotation(torch.ones(1, 4)), torch.eye(4, dtype=torch.float64))


def test_the_closed_form_gives_inputs_and_weight_one_flat_second_moment() -> None:
    """WUSH: both become H S H, S² the eigenvalues of G C; its diagonal is tr S / B throughout."""
    weight, x = torch.randn(90, 16, generator=gen(1)), torch.randn(300, 16, generator=gen(2))
    weight[:, 4] *= 20
    x[:, [1, 7]] *= 30
    g, c = moment(weight.double()), moment(x.double())
    g, c = g / g.diagonal().mean(), c / c.diagonal().mean()
    m = second_moment_map(g, c, damping=0.0)
    inverse = torch.linalg.inv(m)
    of_inputs, of_weight = m.t() @ c @ m, inverse @ g @ inverse.t()
    torch.testing.assert_close(of_inputs, of_weight, rtol=1e-6, atol=1e-9)
    flat = hadamard(16)
    spectrum = flat @ of_inputs @ flat
    expected = torch.linalg.eigvals(g @ c).real.sort().values.sqrt()
    torch.testing.assert_close(spectrum.diagonal().sort().values, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        of_inputs.diagonal(), (expected.sum() / 16).expand(16), rtol=1e-6, atol=1e-9
    )


def test_the_closed_form_beats_a_hadamard_rotation_in_the_product_of_sizes() -> None:
    """tr S against the product of norms that every orthogonal matrix leaves as it is."""
    weight, x = torch.randn(90, 16, generator=gen(3)), torch.randn(300, 16, generator=gen(4))
    x[:, 2] *= 40
    g, c = moment(weight.double()), moment(x.double())
    m = second_moment_map(g, c)
    inverse = torch.linalg.inv(m)
    ours = (m.t() @ c @ m).trace() * (inverse @ g @ inverse.t()).trace()
    assert ours < 0.2 * c.trace() * g.trace()


def test_diagonal_moments_give_a_smoothing_with_exponent_a_half_and_a_hadamard() -> None:
    """M = D P H with D = diag((g/c)^¼), P a permutation: M Mᵀ = D², and M is flat in each row."""
    weight, x = torch.randn(90, 16, generator=gen(1)), torch.randn(300, 16, generator=gen(2))
    weight[:, 4] *= 20
    x[:, [1, 7]] *= 30
    g, c = (shrunk(moment(rows.double()), 1.0) for rows in (weight, x))
    m = second_moment_map(g, c, damping=0.0)
    size = (g.diagonal() / g.diagonal().mean()) / (c.diagonal() / c.diagonal().mean())
    torch.testing.assert_close(m @ m.t(), size.sqrt().diag(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(m.abs(), (size**0.25 / 4).unsqueeze(1).expand(16, 16))


def test_shrinking_scales_what_is_off_the_diagonal() -> None:
    square = moment(torch.randn(20, 5, generator=gen(3)))
    assert torch.equal(shrunk(square, 0.0), square)
    torch.testing.assert_close(shrunk(square, 0.25).diagonal(), square.diagonal())
    off = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(shrunk(square, 0.25)[off], 0.75 * square[off])


def test_a_side_without_energy_counts_as_white() -> None:
    for g, c in ((torch.zeros(8, 8), torch.eye(8)), (torch.eye(8), torch.zeros(8, 8))):
        m = second_moment_map(g, c)
        assert bool(m.isfinite().all()) and float(torch.linalg.cond(m)) < 1.1


def test_bad_input_is_named() -> None:
    bad = torch.eye(4)
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight's second moment.*\[1, 2\]"):
        second_moment_map(bad, torch.eye(4))
    with pytest.raises(NonFiniteError, match=r"input's second moment"):
        second_moment_map(torch.eye(4), bad)
    with pytest.raises(NonFiniteError, match=r"activations"):
        greedy_rotation(bad)
    with pytest.raises(ValueError, match=r"rows \[R, B\]"):
        greedy_rotation(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="power of two"):
        second_moment_map(torch.eye(6), torch.eye(6))
