"""A 16-bit low-rank branch beside the integers (SVDQuant, arXiv 2411.05007, section 4.2).

Outliers that were moved from the inputs into the weight make a few of its directions large.  The
largest r of them are taken out before rounding and multiplied in 16 bits:

    x Wᵀ = x (W − B A)ᵀ + (x Aᵀ) Bᵀ,        A [r, K],  B [N, r],

where W − B A, transformed and rounded to integers, has what the truncated singular value
decomposition leaves.  The decomposition is that of the transformed weight W' = W T⁻ᵀ, since that is
what will be rounded: W' ≈ U_r S_r V_rᵀ gives B = U_r S_r and A = V_rᵀ Tᵀ, which reads the input as
it is.  Both are rounded to bfloat16 first and subtracted as rounded, so that no precision is lost
that the integers do not see.

The branch costs 16 r (K + N) bits: 5 % of a 4-bit weight of 4096 × 4096 at rank 32, and more than
the weight itself in layers a few hundred wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from omega_qvla.quantization.transforms import BlockTransform, bfloat16_representable


@dataclass(frozen=True)
class LowRankBranch:
    """What is multiplied in 16 bits.

    Attributes:
        down: A [r, K] float32, every entry a bfloat16 number; reads the untransformed input.
        up: B [N, r], likewise.
    """

    down: Tensor
    up: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x [..., K] → (x Aᵀ) Bᵀ [..., N], float32."""
        return F.linear(F.linear(x.to(torch.float32), self.down), self.up)

    def residual(self, weight: Tensor) -> Tensor:
        """W − B A [N, K] float32: what is left for the integers."""
        product = self.up.to(torch.float64) @ self.down.to(torch.float64)
        return (weight.to(torch.float64) - product).to(torch.float32)


def low_rank_branch(weight: Tensor, transform: BlockTransform | None, rank: int) -> LowRankBranch:
    """The branch that takes the largest directions out of a weight.

    Args:
        weight: [N, K], finite.
        transform: T of the site, or None.
        rank: r; at most min(N, K) is used.

    Returns:
        A branch whose ``residual`` is, up to the rounding of A and B, the transformed weight
        without its r largest singular values.
    """
    rank = min(rank, *weight.shape)
    folded = weight if transform is None else transform.fold(weight)
    u, s, v = torch.linalg.svd(folded.to(torch.float64), full_matrices=False)
    signs = torch.where(u.gather(0, u.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0)
    up = (u * s * signs)[:, :rank]
    down = (v * signs.t())[:rank]
    if transform is not None:
        down = _through(transform, down)
    return LowRankBranch(bfloat16_representable(down), bfloat16_representable(up))


def _through(transform: BlockTransform, down: Tensor) -> Tensor:
    """Rows v of the transformed space [r, K'] → v Tᵀ of the input space [r, K]."""
    blocks = down.unflatten(-1, (-1, transform.block))
    matrices = transform.matrix.to(down.dtype)
    mixed = torch.einsum("rgj,gij->rgi", blocks, matrices).flatten(-2)
    if transform.permutation is not None:
        restored = torch.empty_like(mixed)
        restored[:, transform.permutation] = mixed
        mixed = restored
    return mixed[:, : transform.width]
