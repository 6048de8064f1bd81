"""Transforms of a linear's input space that make four bits enough.

A linear y = x Wᵀ is unchanged when x' = x T is multiplied with W' = W T⁻ᵀ, for any invertible T.
T is block diagonal with small blocks (64), so applying it costs little, and is chosen per block g
so that x' and W' have no channel that stands out:

    T_g = diag(1/c_g) · U_g · H        x' = x T,   W' = W T⁻ᵀ ≈ (W diag(c)) U H

* **Balance** c_j = rms(x_j)^α / rms(W_:j)^(1-α) moves magnitude from the channels of x to the
  columns of W (SmoothQuant, arXiv 2211.10438, section 4, with rms in place of the maximum).
  Rotation alone only spreads an outlier over its block; balancing removes it first.
* **Composite rotation** R = U H of the *balanced* weight (arXiv 2605.28803): U holds the right
  singular vectors of the block, H is the Sylvester Hadamard matrix over √B (rotations for
  quantization: QuaRot, arXiv 2404.00456).  Since ‖W_g U h_j‖² = Σσ²/B for every j, all channels
  of a block end up with exactly the same weight energy.
* **Permutation** (optional) deals channels over blocks in a snake, 0 1 … n n … 1 0, from the most
  to the least energetic (the zigzag of DuQuant, arXiv 2406.01721), so that no block collects the
  outliers.  It is an index gather before the blocks.

T is stored in bfloat16, so the matrix used everywhere is the *rounded* one, and W is folded with
the float64 inverse of exactly that matrix: rounding T costs orthogonality in the third digit but
never correctness.  Rounding is relative per entry and therefore commutes with the row scaling
1/c up to rounding itself; after dividing its rows by their norms T_g is as well conditioned as a
rotation, whatever the range of c, and the inverse is computed in that form.

Layout: ``matrix`` [K/B, B, B] float32 (bfloat16-representable); row i of block g belongs to input
channel g·B + i after permutation.  Widths that are not a multiple of B are padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from omega_qvla.quantization.checks import require_finite
from omega_qvla.recipe import TransformScheme

MIN_BALANCE, MAX_BALANCE = 2.0**-10, 2.0**16
"""Bounds of c around its geometric mean 1.

Large c is harmless.  Small c *amplifies* a channel, and a channel that merely looked silent during
calibration would then swamp its block, hence the tighter lower bound.
"""


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Sylvester's Hadamard matrix over √n: symmetric, orthogonal, all entries ±1/√n.

    Args:
        n: a power of two.
        dtype: of the result.

    Returns:
        [n, n].

    Raises:
        ValueError: n is not a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Sylvester Hadamard matrix needs a power of two, got {n}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat(
            (torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)), dim=0
        )
    return (matrix / n**0.5).to(dtype)


def padded_width(width: int, block: int) -> int:
    """The smallest multiple of ``block`` that is not below ``width``."""
    return -(-width // block) * block


def pad_to_block(x: Tensor, block: int) -> Tensor:
    """Append zero columns to x [..., K] up to a multiple of ``block``."""
    missing = padded_width(x.shape[-1], block) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def column_rms(weight: Tensor) -> Tensor:
    """Root mean square of each column of weight [N, K] → [K] float64."""
    norm = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float64)
    return norm / max(weight.shape[0], 1) ** 0.5


def balance_factors(input_rms: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Per-channel factors c of the balance step: x/c, W·c.

    c_j = rms(x_j)^α / rms(W_:j)^(1-α), divided by the geometric mean over live channels and
    clamped to [MIN_BALANCE, MAX_BALANCE].  A channel that is dead on one side (all zeros) is
    balanced by the other side alone; a channel dead on both sides gets 1.

    Args:
        input_rms: [K] root mean square of each input channel over calibration, not negative.
        weight: [N, K]; for fused linears the stacked weight.
        alpha: exponent in [0, 1]; 1 flattens x completely, 0 flattens W.

    Returns:
        [K] float64, all positive.

    Raises:
        NonFiniteError: NaN or Inf in ``input_rms`` or ``weight``.
        ValueError: shapes do not match, or a negative rms.
    """
    if weight.ndim != 2 or input_rms.shape != (weight.shape[1],):
        raise ValueError(
            f"balance needs input_rms [K] for weight [N, K], got {list(input_rms.shape)} "
            f"and {list(weight.shape)}"
        )
    require_finite(input_rms, "the input's channel rms")
    require_finite(weight, "weight")
    if bool((input_rms < 0).any()):
        raise ValueError("a root mean square cannot be negative")
    log_input, live_input = _log_with_neutral_zeros(input_rms.to(torch.float64))
    log_weight, live_weight = _log_with_neutral_zeros(column_rms(weight))
    log_factor = alpha * log_input - (1.0 - alpha) * log_weight
    both = live_input & live_weight
    if bool(both.any()):
        log_factor = log_factor - log_factor[both].mean()
    factor = log_factor.exp().clamp(MIN_BALANCE, MAX_BALANCE)
    return torch.where(live_input | live_weight, factor, torch.ones_like(factor))


def _log_with_neutral_zeros(rms: Tensor) -> tuple[Tensor, Tensor]:
    """Log of rms with zeros replaced by the geometric mean of the rest, and which were live."""
    live = rms > 0
    if not bool(live.any()):
        return torch.zeros_like(rms), live
    log = torch.where(live, rms, torch.ones_like(rms)).log()
    return torch.where(live, log, log[live].mean()), live


def snake_permutation(energy: Tensor, block: int) -> Tensor:
    """Deal channels over blocks in a snake, most energetic first.

    With n blocks, channels ranked by energy go to blocks 0 … n-1, n-1 … 0, 0 … n-1, and so on:
    block sums stay close and every block gets exactly one of the n largest.

    Args:
        energy: [K], K a multiple of ``block``; ties keep channel order.
        block: channels per block.

    Returns:
        [K] int64 gather index: x' = x[..., permutation].

    Raises:
        ValueError: K is not a multiple of ``block``.
    """
    width = energy.numel()
    if width % block:
        raise ValueError(f"width {width} is not a multiple of the block {block}")
    blocks = width // block
    ranked = torch.argsort(energy, descending=True, stable=True).reshape(block, blocks)
    ranked[1::2] = ranked[1::2].flip(-1)
    return ranked.t().reshape(-1).contiguous()


def svd_basis(weight_block: Tensor) -> Tensor:
    """Right singular vectors of a weight block, as eigenvectors of WᵀW.

    Columns are ordered by falling singular value and signed so that the entry of largest
    magnitude (the first, among equals) is positive: the same block always gives the same basis.

    Args:
        weight_block: [N, B], any N ≥ 0.

    Returns:
        [B, B] float64, orthogonal.

    Raises:
        NonFiniteError: NaN or Inf in the block.
    """
    require_finite(weight_block, "weight")
    block = weight_block.to(torch.float64)
    return _eigenbasis(block.t() @ block)


def _eigenbasis(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric [B, B] matrix, descending, with fixed signs."""
    largest = float(gram.diagonal().max()) if gram.numel() else 0.0
    if largest > 0.0:
        gram = gram / largest
    basis = torch.linalg.eigh((gram + gram.t()) / 2).eigenvectors.flip(-1)
    leading = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(leading < 0, -1.0, 1.0)


def bfloat16_representable(x: Tensor) -> Tensor:
    """Round to bfloat16 and return float32: what will be stored, at a computable precision."""
    return x.to(torch.bfloat16).to(torch.float32)


def _symmetrize(matrix: Tensor, tile: int = 2048) -> Tensor:
    """(M + Mᵀ)/2 in place, tile by tile."""
    for i in range(0, matrix.shape[0], tile):
        for j in range(i, matrix.shape[0], tile):
            upper, lower = matrix[i : i + tile, j : j + tile], matrix[j : j + tile, i : i + tile]
            mean = (upper + lower.t()) / 2
            upper.copy_(mean)
            lower.copy_(mean.t())
    return matrix


@dataclass(frozen=True)
class BlockTransform:
    """An invertible block-diagonal transform T of an input space.

    Attributes:
        matrix: [K/B, B, B] float32, every entry exactly a bfloat16 number.
        permutation: [K] int64 gather index applied before the blocks, or None.
        block: B.
        width: width of the untransformed input; inputs are zero-padded from it to K.
    """

    matrix: Tensor
    permutation: Tensor | None
    block: int
    width: int

    def __post_init__(self) -> None:
        padded = padded_width(self.width, self.block)
        expected = (padded // self.block, self.block, self.block)
        if self.matrix.shape != expected:
            raise ValueError(
                f"a transform of width {self.width} in blocks of {self.block} needs a matrix "
                f"{list(expected)}, got {list(self.matrix.shape)}"
            )
        if self.permutation is not None and self.permutation.shape != (padded,):
            raise ValueError(
                f"the permutation must have {padded} entries, got {list(self.permutation.shape)}"
            )

    @property
    def padded_width(self) -> int:
        """K, the width of the transformed space."""
        return self.matrix.shape[0] * self.block

    def apply(self, x: Tensor) -> Tensor:
        """x [..., width] → x' = x T [..., K]; float64 stays float64, all else becomes float32."""
        self._check_width(x)
        return self._multiply(x, self.matrix)

    def fold(self, weight: Tensor) -> Tensor:
        """Weight [N, width] → W' = W T⁻ᵀ [N, K], so that x' W'ᵀ = x Wᵀ.

        Computed in float64 against the stored matrix; returned as float32 (float64 for float64).
        """
        self._check_width(weight)
        row_norm = torch.linalg.vector_norm(self.matrix, dim=-1, keepdim=True, dtype=torch.float64)
        balanced = self.matrix.to(torch.float64) / row_norm
        # T = diag(r) Q, hence T⁻ᵀ = diag(1/r) Q⁻ᵀ, and Q is close to orthogonal.
        inverse_transpose = torch.linalg.inv(balanced).transpose(-1, -2) / row_norm
        return self._multiply(weight, inverse_transpose)

    def second_moment(self, moment: Tensor) -> Tensor:
        """Second moment Σ xᵀx [width, width] of inputs → of transformed inputs, Tᵀ H T [K, K].

        ``moment``, float32 or float64, is used up: at K = 16384 every copy would be a gigabyte.
        """
        if moment.shape != (self.width, self.width):
            raise ValueError(
                f"the second moment must be [{self.width}, {self.width}], got {list(moment.shape)}"
            )
        moment = pad_to_block(pad_to_block(moment, self.block).t(), self.block).t()
        if self.permutation is not None:
            moment = moment[self.permutation][:, self.permutation]
        blocks = [slice(i, i + self.block) for i in range(0, self.padded_width, self.block)]
        matrices = self.matrix.to(moment.dtype)
        for block, matrix in zip(blocks, matrices, strict=True):
            moment[:, block] = moment[:, block] @ matrix
        for block, matrix in zip(blocks, matrices, strict=True):
            moment[block] = matrix.t() @ moment[block]
        return _symmetrize(moment)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            raise ValueError(
                f"this transform is for width {self.width}, got a tensor {list(x.shape)}"
            )

    def _multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Gather and multiply block by block, in the matrices' dtype; never copies x whole."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.permutation is not None or x.shape[-1] != self.padded_width:
            x = pad_to_block(x, self.block)
        if self.permutation is not None:
            x = x[..., self.permutation]
        rows = x.reshape(-1, self.padded_width)
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        compute = torch.promote_types(dtype, matrices.dtype)
        for g, matrix in enumerate(matrices):
            columns = slice(g * self.block, (g + 1) * self.block)
            out[:, columns] = rows[:, columns].to(compute) @ matrix.to(compute)
        return out.reshape(*x.shape[:-1], self.padded_width)


def block_transform(
    weight: Tensor, scheme: TransformScheme, input_rms: Tensor | None = None
) -> BlockTransform:
    """The transform a scheme asks for.

    Args:
        weight: [N, K]; for fused linears the stacked weight.
        scheme: rotation, balance exponent, permutation and block size.
        input_rms: [K] rms of each input channel over calibration; required for balancing, and
            what the permutation ranks channels by (weight energy is used without it).

    Returns:
        The transform, its matrix already rounded to what bfloat16 can hold (an identity when the
        scheme asks for nothing; callers skip it then).

    Raises:
        NonFiniteError: NaN or Inf in ``weight`` or ``input_rms``.
        ValueError: shapes do not match, balancing without ``input_rms``, or a Hadamard rotation
            with a block that is not a power of two.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    require_finite(weight, "weight")
    width = weight.shape[1]
    if input_rms is not None:
        if input_rms.shape != (width,):
            raise ValueError(f"input_rms must be [{width}], got {list(input_rms.shape)}")
        require_finite(input_rms, "the input's channel rms")
    factor = torch.ones(width, dtype=torch.float64, device=weight.device)
    if scheme.balance is not None:
        if input_rms is None:
            raise ValueError("balancing needs the rms of the input channels from calibration")
        factor = balance_factors(input_rms, weight, scheme.balance)
    padded = padded_width(width, scheme.block)
    factor = F.pad(factor, (0, padded - width), value=1.0)
    weight = pad_to_block(weight, scheme.block)

    permutation = None
    if scheme.permutation == "snake":
        rms = column_rms(weight) * factor
        if input_rms is not None:
            rms = pad_to_block(input_rms.to(torch.float64), scheme.block) / factor
        permutation = snake_permutation(rms.square(), scheme.block)
        factor = factor[permutation]

    matrices: list[Tensor] = []
    for g in range(padded // scheme.block):
        channels = slice(g * scheme.block, (g + 1) * scheme.block)
        block = weight[:, channels] if permutation is None else weight[:, permutation[channels]]
        c = factor[channels]
        matrices.append(_rotation(block.to(torch.float64) * c, scheme) / c.unsqueeze(-1))
    return BlockTransform(
        bfloat16_representable(torch.stack(matrices)), permutation, scheme.block, width
    )


def _rotation(block: Tensor, scheme: TransformScheme) -> Tensor:
    """The orthogonal part of one block's transform; ``block`` [N, B] is the balanced weight."""
    size = block.shape[1]
    if scheme.rotation == "none":
        return torch.eye(size, dtype=torch.float64, device=block.device)
    if scheme.rotation == "svd":
        return svd_basis(block)
    flat = hadamard(size).to(block.device)
    return flat if scheme.rotation == "hadamard" else svd_basis(block) @ flat


@dataclass(frozen=True)
class OutputRotation:
    """An orthogonal rotation of a linear's output in row blocks, undone after the product.

    The weight's rows are mixed before rounding, W' = Rᵀ W, and y = y' Rᵀ restores the output.  The
    undoing is a second transform at run time, so this is part of simulations only.

    Attributes:
        matrix: [ceil(N/B), B, B] float32, one orthogonal R per block of rows; where N ends inside
            the last block, the rest of that block is an identity.
        height: N.
    """

    matrix: Tensor
    height: int

    @property
    def block(self) -> int:
        """B."""
        return self.matrix.shape[-1]

    def fold(self, weight: Tensor) -> Tensor:
        """Weight [N, K] → Rᵀ W [N, K]; float64 stays float64, all else becomes float32."""
        return self._rotate(weight.t(), self.matrix).t().contiguous()

    def undo(self, y: Tensor) -> Tensor:
        """Rotated output y' [..., N] → y [..., N], before any bias."""
        return self._rotate(y, self.matrix.transpose(-1, -2))

    def _rotate(self, x: Tensor, matrices: Tensor) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if x.shape[-1] != self.height:
            raise ValueError(f"this rotation is for {self.height} outputs, got {list(x.shape)}")
        blocks = pad_to_block(x.to(dtype), self.block).unflatten(-1, (-1, self.block))
        out = torch.einsum("...gi,gij->...gj", blocks, matrices.to(dtype))
        return out.flatten(-2)[..., : x.shape[-1]]


def output_rotation(weight: Tensor, block: int = 64) -> OutputRotation:
    """Composite rotation of the output space: left singular vectors per row block, times H.

    All rows of a block end up with the same energy, so one clip ratio suits them all.  A shorter
    last block is rotated by its singular vectors alone.

    Args:
        weight: [N, K], normally already folded with its input transform.
        block: rows per block, a power of two.

    Raises:
        NonFiniteError: NaN or Inf in ``weight``.
        ValueError: ``block`` is not a power of two.
    """
    require_finite(weight, "weight")
    flat = hadamard(block).to(weight.device)
    matrices: list[Tensor] = []
    for rows in weight.split(block):
        rotation = torch.eye(block, dtype=torch.float64, device=weight.device)
        count = rows.shape[0]
        basis = svd_basis(rows.t())
        rotation[:count, :count] = basis @ flat if count == block else basis
        matrices.append(rotation)
    return OutputRotation(torch.stack(matrices).to(torch.float32), weight.shape[0])
