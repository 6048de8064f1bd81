"""The 16-bit branch takes exactly the largest singular directions out of what is rounded."""

from __future__ import annotations

import pytest
import torch

from omega_qvla.artifact.layout import site_layout
from omega_qvla.quantization.low_rank import low_rank_branch
from omega_qvla.quantization.transforms import InputSummary, block_transform
from omega_qvla.recipe import Scheme, TransformScheme, WeightScheme


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spiked(outputs: int = 40, width: int = 100) -> torch.Tensor:
    """A noisy weight with three strong directions."""
    strong = torch.randn(outputs, 3, generator=gen(0)) @ torch.randn(3, width, generator=gen(1))
    return 10 * strong + torch.randn(outputs, width, generator=gen(2))


@pytest.mark.parametrize("permutation", ["none", "snake"])
@pytest.mark.parametrize("rotation", ["none", "svd_hadamard"])
def test_the_residual_is_the_truncated_decomposition_of_the_transformed_weight(
    rotation: str, permutation: str
) -> None:
    """Singular values beyond the rank stay, the rank's own vanish: up to bfloat16, 2^-8 of σ_1."""
    weight, x = spiked(), torch.randn(50, 100, generator=gen(3))
    x[:, 7] *= 30
    scheme = TransformScheme.model_validate(
        {"rotation": rotation, "permutation": permutation, "smoothing": 0.5, "block": 32}
    )
    summary = InputSummary(x.square().mean(0).sqrt())
    transform = block_transform(weight, scheme, summary)
    branch = low_rank_branch(weight, transform, 3)
    before = torch.linalg.svdvals(transform.fold(weight))
    after = torch.linalg.svdvals(transform.fold(branch.residual(weight)))
    torch.testing.assert_close(after[:37], before[3:], rtol=0.02, atol=2**-8 * float(before[0]))
    assert float(after[0]) < 0.2 * float(before[2])


def test_branch_and_residual_add_up_to_the_weight() -> None:
    weight, x = spiked(), torch.randn(9, 100, generator=gen(4))
    branch = low_rank_branch(weight, None, 3)
    found = branch.apply(x) + x @ branch.residual(weight).t()
    torch.testing.assert_close(found, x @ weight.t(), rtol=1e-4, atol=1e-3)
    for factor in (branch.down, branch.up):
        assert torch.equal(factor.bfloat16().float(), factor)


def test_a_weight_of_low_rank_leaves_only_what_bfloat16_drops() -> None:
    weight = torch.outer(torch.arange(1.0, 9.0), torch.ones(16))
    branch = low_rank_branch(weight, None, 32)
    assert branch.down.shape == (8, 16) and branch.up.shape == (8, 8)
    assert float(branch.residual(weight).norm()) < 2**-7 * float(weight.norm())


def test_the_rank_is_no_more_than_the_weight_has() -> None:
    """And the schema of what is stored says the same."""
    scheme = Scheme(weights=WeightScheme(low_rank=32), transform=TransformScheme(rotation="none"))
    for outputs, inputs, rank in ((8, 64, 8), (64, 8, 8), (64, 64, 32)):
        branch = low_rank_branch(torch.randn(outputs, inputs, generator=gen(0)), None, 32)
        layout = site_layout(scheme, inputs, [outputs], False, 1)
        assert branch.down.shape == layout["low_rank_down"].shape == (rank, inputs)
        assert branch.up.shape == layout["low_rank_up"].shape == (outputs, rank)
