"""Transforms keep the function, flatten energies, and stay invertible under huge outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import NonFiniteError
from omega_qvla.quantization.rotations import hadamard, svd_basis
from omega_qvla.quantization.transforms import (
    BlockTransform,
    InputSummary,
    block_transform,
    output_rotation,
    pad_to_block,
    smoothing_factors,
    smoothquant_factors,
    snake_permutation,
)
from omega_qvla.recipe import TransformScheme


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outlier_layer(seed: int, rows: int, outputs: int, width: int, magnitude: float):
    """Inputs with a few channels x magnitude and the weight columns that undo them, float64."""
    g = gen(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = torch.randn(outputs, width, generator=g, dtype=torch.float64)
    channels = torch.randperm(width, generator=g)[: max(1, width // 20)]
    x[:, channels] *= magnitude
    weight[:, channels] /= magnitude
    return x, weight


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(0).sqrt()


def summary(x: torch.Tensor) -> InputSummary:
    return InputSummary(rms(x), x.abs().amax(0), x.t() @ x, x)


SCHEMES = [
    TransformScheme(rotation=rotation, smoothing=smoothing, permutation=permutation, block=block)
    for rotation in ("none", "hadamard", "svd", "svd_hadamard", "greedy")
    for smoothing in (None, 0.65)
    for permutation in ("none", "snake")
    for block in (16, 64)
    if (rotation, smoothing, permutation) != ("none", None, "none")
]


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_hadamard_is_symmetric_orthogonal_and_flat(n: int) -> None:
    h = hadamard(n)
    torch.testing.assert_close(h @ h.t(), torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(h, h.t())
    assert torch.all(h.abs() == h[0, 0])


@pytest.mark.parametrize("n", [0, 3, 48])
def test_hadamard_refuses_other_sizes(n: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(n)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 150),
    outputs=st.integers(1, 40),
    exponent=st.floats(0.0, 3.0),
    scheme=st.sampled_from(SCHEMES),
)
def test_the_function_is_preserved(
    seed: int, width: int, outputs: int, exponent: float, scheme: TransformScheme
) -> None:
    """Outliers up to x1000.  In float64 only the condition of T (about 1) times 1e-16 is lost."""
    x, weight = outlier_layer(seed, 9, outputs, width, 10.0**exponent)
    transform = block_transform(weight, scheme, summary(x))
    expected = x @ weight.t()
    got = transform.apply(x) @ transform.fold(weight).t()
    scale = expected.abs().max()
    assert float((got - expected).abs().max() / scale) < 1e-11
    single = transform.apply(x.float()) @ transform.fold(weight.float()).t()
    assert single.dtype == torch.float32
    # Float32: unsmoothed outliers of 1000 are mixed into every channel of their block.
    assert float((single - expected).abs().max() / scale) < 2e-3
    if scheme.smoothing is not None:
        assert float((single - expected).abs().max() / scale) < 2e-5


@pytest.mark.parametrize("magnitude", [30.0, 1e3, 1e5])
def test_transform_is_a_rotation_up_to_its_row_scaling(magnitude: float) -> None:
    """Rounding to bfloat16 (relative 2^-9 per entry) is all that separates it from one."""
    x, weight = outlier_layer(3, 200, 80, 128, magnitude)
    transform = block_transform(weight, TransformScheme(smoothing=0.65), summary(x))
    rows = transform.matrix.double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    assert float(torch.linalg.cond(rows).max()) < 1.05


def test_matrix_survives_bfloat16_storage() -> None:
    x, weight = outlier_layer(0, 50, 40, 128, 100.0)
    transform = block_transform(weight, TransformScheme(smoothing=0.5), summary(x))
    assert torch.equal(transform.matrix, transform.matrix.to(torch.bfloat16).float())


def test_composite_rotation_equalises_weight_energy_in_each_block() -> None:
    """Exact in real numbers; 1 % is what bfloat16 leaves."""
    x, weight = outlier_layer(1, 100, 96, 128, 30.0)
    for smoothing in (None, 0.65):
        transform = block_transform(weight, TransformScheme(smoothing=smoothing), summary(x))
        energy = transform.fold(weight).square().sum(0).reshape(-1, 64)
        spread = energy.amax(1) / energy.amin(1)
        assert float(spread.max()) < 1.02


def test_balancing_removes_what_rotation_leaves() -> None:
    """Output error of 4-bit per-token inputs alone: rotating a x300 outlier drowns its block."""
    x, weight = outlier_layer(2, 400, 96, 128, 300.0)

    def error(smoothing: float | None) -> float:
        transform = block_transform(weight, TransformScheme(smoothing=smoothing), summary(x))
        y = transform.apply(x)
        scale = y.abs().amax(1, keepdim=True) / 7
        difference = ((y / scale).round() * scale - y) @ transform.fold(weight).t()
        return float(difference.square().sum() / (x @ weight.t()).square().sum())

    assert error(0.65) < 0.03
    assert error(None) > 10 * error(0.65)


def test_smoothing_factors_are_normalised_and_survive_dead_channels() -> None:
    g = gen(5)
    weight = torch.randn(20, 10, generator=g)
    input_rms = torch.rand(10, generator=g) + 0.1
    input_rms[[1, 3]] = 0.0
    weight[:, [2, 3]] = 0.0
    input_rms[2] = 50.0
    c = smoothing_factors(input_rms, weight, 0.7)
    assert bool((c > 0).all()) and bool(c.isfinite().all())
    assert float(c[3]) == 1.0  # dead on both sides
    live = [0, 4, 5, 6, 7, 8, 9]
    assert float(c[live].log().mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(c[2]) > 2.0  # dead weight column: the large input is still divided
    torch.testing.assert_close(c, smoothing_factors(input_rms * 7.0, weight * 3.0, 0.7))


def test_smoothing_factors_follow_the_formula() -> None:
    g = gen(6)
    weight, input_rms = torch.randn(30, 8, generator=g).double(), torch.rand(8, generator=g) + 0.1
    expected = input_rms.double() ** 0.6 / rms(weight) ** 0.4
    expected = expected / expected.log().mean().exp()
    torch.testing.assert_close(smoothing_factors(input_rms, weight, 0.6), expected)


def test_smoothquant_factors_are_those_of_smoothquant() -> None:
    """By hand, α = 0.5: √(4/1) = 2 and √(1/4) = 0.5, whose geometric mean is 1 already."""
    weight = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    factors = smoothquant_factors(torch.tensor([4.0, 1.0]), weight, 0.5)
    assert factors.tolist() == pytest.approx([2.0, 0.5])
    assert smoothquant_factors(torch.tensor([4.0, 1.0]), weight, 1.0).tolist() == pytest.approx(
        [2.0, 0.5]
    )
    with pytest.raises(ValueError, match="input_maxima"):
        smoothquant_factors(torch.ones(3), weight, 0.5)


def test_magnitude_decides_what_balance_and_permutation_go_by() -> None:
    """Channel 0 is large always, channel 1 once: the mean square ranks them one way, the maximum
    the other."""
    x = torch.ones(100, 4)
    x[:, 0], x[0, 1] = 3.0, 20.0
    weight = torch.eye(4)
    orders = {}
    for magnitude in ("rms", "max"):
        content = {"rotation": "none", "permutation": "snake", "block": 2, "magnitude": magnitude}
        scheme = TransformScheme.model_validate(content)
        found = block_transform(weight, scheme, summary(x))
        assert found.permutation is not None
        orders[magnitude] = found.permutation.tolist()
    assert orders == {"rms": [0, 3, 1, 2], "max": [1, 3, 0, 2]}


def test_the_greedy_transform_knows_nothing_of_padding() -> None:
    x, weight = outlier_layer(11, 60, 20, 40, 30.0)
    scheme = TransformScheme(rotation="greedy", block=16)
    transform = block_transform(weight, scheme, summary(x))
    assert float(transform.apply(x).abs().max()) < float(x.abs().max()) / 2


def test_the_second_moment_transform_keeps_the_function_with_outliers_and_padding() -> None:
    """It is no rotation: float64 loses the square root of its condition, float32 more."""
    for magnitude in (1.0, 30.0, 1e3):
        x, weight = outlier_layer(12, 300, 50, 90, magnitude)
        for smoothing in (None, 0.5):
            scheme = TransformScheme(rotation="second_moment", smoothing=smoothing, block=32)
            transform = block_transform(weight, scheme, summary(x))
            found = transform.apply(x) @ transform.fold(weight).t()
            expected = x @ weight.t()
            assert float((found - expected).abs().max() / expected.abs().max()) < 1e-9


def test_all_dead_inputs_are_left_alone() -> None:
    c = smoothing_factors(torch.zeros(6), torch.zeros(4, 6), 0.5)
    assert torch.equal(c, torch.ones(6, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), blocks=st.integers(1, 9), block=st.sampled_from([2, 8, 16]))
def test_snake_deals_every_channel_once_and_evenly(seed: int, blocks: int, block: int) -> None:
    energy = torch.randn(blocks * block, generator=gen(seed)).exp()
    permutation = snake_permutation(energy, block)
    assert torch.equal(permutation.sort().values, torch.arange(blocks * block))
    dealt = energy[permutation].reshape(blocks, block)
    largest = energy.sort(descending=True).values[:blocks]
    torch.testing.assert_close(dealt.amax(1).sort(descending=True).values, largest)
    # Pairs of snake rounds differ by at most one channel's worth.
    assert float(dealt.sum(1).max() - dealt.sum(1).min()) <= float(energy.max()) + 1e-4


def test_snake_order_by_hand() -> None:
    energy = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert snake_permutation(energy, 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


def test_svd_basis_diagonalises_and_has_fixed_signs() -> None:
    block = torch.randn(40, 16, generator=gen(7), dtype=torch.float64)
    basis = svd_basis(block)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(16, dtype=torch.float64))
    gram = basis.t() @ block.t() @ block @ basis
    torch.testing.assert_close(
        gram.diagonal().sqrt(), torch.linalg.svdvals(block), rtol=1e-9, atol=1e-9
    )
    leading = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert bool((leading > 0).all())
    # Singular vectors of -W are those of W: the sign convention must make them equal.
    torch.testing.assert_close(svd_basis(-block), basis)


@pytest.mark.parametrize("outputs", [0, 3])
def test_svd_basis_of_degenerate_blocks_is_orthogonal(outputs: int) -> None:
    basis = svd_basis(torch.zeros(outputs, 8))
    torch.testing.assert_close(basis.t() @ basis, torch.eye(8, dtype=torch.float64))


def test_second_moment_is_that_of_transformed_inputs() -> None:
    x, weight = outlier_layer(8, 300, 30, 100, 30.0)
    scheme = TransformScheme(smoothing=0.65, permutation="snake", block=32)
    transform = block_transform(weight, scheme, summary(x))
    y = transform.apply(x)
    torch.testing.assert_close(transform.second_moment(x.t() @ x), y.t() @ y)


def test_output_rotation_preserves_the_function_and_equalises_rows() -> None:
    g = gen(9)
    x = torch.randn(7, 48, generator=g)
    for outputs in (128, 100, 5):
        weight = torch.randn(outputs, 48, generator=g)
        weight[::9] *= 20.0
        rotation = output_rotation(weight)
        rotated = rotation.fold(weight)
        assert rotated.shape == weight.shape
        torch.testing.assert_close(
            rotation.undo(x @ rotated.t()), x @ weight.t(), rtol=1e-4, atol=1e-3
        )
        if outputs == 128:
            energy = rotated.square().sum(1).reshape(-1, 64)
            assert float((energy.amax(1) / energy.amin(1)).max()) < 1.001


def test_plain_scheme_only_pads() -> None:
    x = torch.randn(4, 5)
    transform = block_transform(x, TransformScheme(rotation="none"))
    assert torch.equal(transform.apply(x), pad_to_block(x, 64))
    assert torch.equal(transform.fold(x), pad_to_block(x, 64))


def test_two_runs_give_the_same_bytes() -> None:
    x, weight = outlier_layer(10, 60, 50, 192, 30.0)
    scheme = TransformScheme(smoothing=0.65, permutation="snake")
    first, second = (block_transform(weight, scheme, summary(x)) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert first.permutation is not None and second.permutation is not None
    assert torch.equal(first.permutation, second.permutation)


def test_bad_input_is_named() -> None:
    weight = torch.randn(4, 8)
    weight[2, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight has 1 .* \[2, 5\]"):
        block_transform(weight, TransformScheme())
    bad_rms = torch.ones(8)
    bad_rms[3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"rms .*\[3\]"):
        block_transform(torch.randn(4, 8), TransformScheme(smoothing=0.5), InputSummary(bad_rms))
    with pytest.raises(ValueError, match="rms of the input"):
        block_transform(torch.randn(4, 8), TransformScheme(smoothing=0.5))
    for rotation, missing in (("greedy", "sampled inputs"), ("second_moment", "second moment")):
        scheme = TransformScheme.model_validate({"rotation": rotation})
        with pytest.raises(ValueError, match=missing):
            block_transform(torch.randn(4, 8), scheme, InputSummary(torch.ones(8)))
    with pytest.raises(ValueError, match="largest magnitudes"):
        scheme = TransformScheme(smoothing=0.5, magnitude="max")
        block_transform(torch.randn(4, 8), scheme, InputSummary(torch.ones(8)))
    with pytest.raises(ValueError, match="power of two"):
        block_transform(torch.randn(4, 8), TransformScheme(block=48))
    with pytest.raises(ValueError, match="width 64"):
        BlockTransform(torch.eye(64).unsqueeze(0), None, 64, 64).apply(torch.randn(3, 65))


def test_padding_appends_zeros() -> None:
    assert pad_to_block(torch.ones(2, 5), 4).tolist() == [[1.0] * 5 + [0.0] * 3] * 2
