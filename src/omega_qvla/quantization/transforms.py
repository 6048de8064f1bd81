"""Transforms of a linear's input space that make four bits enough.

A linear y = x Wᵀ is unchanged when x' = x T is multiplied with W' = W T⁻ᵀ, for any invertible T.
T is block diagonal with small blocks (64), so applying it costs little, and is chosen per block g
so that x' and W' have no channel that stands out:

    T_g = diag(1/c_g) · U_g · H        x' = x T,   W' = W T⁻ᵀ ≈ (W diag(c)) U H

* **Smoothing** c_j = rms(x_j)^α / rms(W_:j)^(1-α) moves magnitude from the channels of x to the
  columns of W (SmoothQuant, arXiv 2211.10438, section 4, with rms in place of the maximum;
  ``magnitude: max`` is the paper's own).
  Rotation alone only spreads an outlier over its block; smoothing removes it first.
* **Composite rotation** R = U H of the *smoothed* weight (arXiv 2605.28803): U holds the right
  singular vectors of the block, H is the Sylvester Hadamard matrix over √B (rotations for
  quantization: QuaRot, arXiv 2404.00456).  Since ‖W_g U h_j‖² = Σσ²/B for every j, all channels
  of a block end up with exactly the same weight energy.  Other maps that may stand in its place,
  published ones among them, are in ``rotations.py``.
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
from omega_qvla.quantization.rotations import (
    greedy_rotation,
    hadamard,
    second_moment_map,
    shrunk,
    svd_basis,
)
from omega_qvla.recipe import TransformScheme

MIN_BALANCE, MAX_BALANCE = 2.0**-10, 2.0**16
"""Bounds of c around its geometric mean 1.

Large c is harmless.  Small c *amplifies* a channel, and a channel that merely looked silent during
calibration would then swamp its block, hence the tighter lower bound.
"""


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


@dataclass(frozen=True)
class InputSummary:
    """What calibration saw of a site's input; a scheme reads what it needs.

    Attributes:
        rms: [K] root mean square of each channel.
        maxima: [K] largest magnitude of each channel.
        moment: [K, K] second moment xᵀx, of any overall scale.
        rows: [R, K] sampled inputs.
    """

    rms: Tensor
    maxima: Tensor | None = None
    moment: Tensor | None = None
    rows: Tensor | None = None


def column_maxima(weight: Tensor) -> Tensor:
    """Largest magnitude of each column of weight [N, K] → [K] float64."""
    return weight.abs().amax(dim=0).to(torch.float64)


def smoothing_factors(input_rms: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Per-channel factors c of the smoothing step: x/c, W·c, from root mean squares.

    c_j = rms(x_j)^α / rms(W_:j)^(1-α), divided by the geometric mean over live channels and
    clamped to [MIN_BALANCE, MAX_BALANCE].  A channel that is dead on one side (all zeros) is
    smoothed by the other side alone; a channel dead on both sides gets 1.

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
    _check_balance(input_rms, weight, "rms")
    return _factors(input_rms, column_rms(weight), alpha)


def smoothquant_factors(input_maxima: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The same from largest magnitudes: c_j = max|x_j|^α / max|W_:j|^(1-α).

    That is SmoothQuant's smoothing factor (arXiv 2211.10438, equation 4) up to the common factor
    by which all are divided here, which scales of weights and activations absorb.

    Args:
        input_maxima: [K] largest magnitude of each input channel over calibration.
        weight: [N, K]; for fused linears the stacked weight.
        alpha: migration strength in [0, 1].

    Returns:
        [K] float64, all positive.

    Raises:
        NonFiniteError: NaN or Inf in ``input_maxima`` or ``weight``.
        ValueError: shapes do not match, or a negative magnitude.
    """
    _check_balance(input_maxima, weight, "maxima")
    return _factors(input_maxima, column_maxima(weight), alpha)


def _check_balance(input_size: Tensor, weight: Tensor, what: str) -> None:
    if weight.ndim != 2 or input_size.shape != (weight.shape[1],):
        raise ValueError(
            f"smoothing needs input_{what} [K] for weight [N, K], got {list(input_size.shape)} "
            f"and {list(weight.shape)}"
        )
    require_finite(input_size, f"the input's channel {what}")
    require_finite(weight, "weight")
    if bool((input_size < 0).any()):
        raise ValueError(f"the {what} of channels cannot be negative")


def _factors(input_size: Tensor, weight_size: Tensor, alpha: float) -> Tensor:
    log_input, live_input = _log_with_neutral_zeros(input_size.to(torch.float64))
    log_weight, live_weight = _log_with_neutral_zeros(weight_size)
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
        smoothed = self.matrix.to(torch.float64) / row_norm
        # T = diag(r) Q, hence T⁻ᵀ = diag(1/r) Q⁻ᵀ, and Q is close to orthogonal.
        inverse_transpose = torch.linalg.inv(smoothed).transpose(-1, -2) / row_norm
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
        x = x.detach()
        if self.permutation is not None or x.shape[-1] != self.padded_width:
            x = pad_to_block(x, self.block)
        if self.permutation is not None:
            x = x[..., self.permutation]
        rows = x.reshape(-1, self.padded_width)
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        if rows.dtype == matrices.dtype == dtype:
            # What a simulation does for every linear: one call in place of three per block.
            torch.bmm(self._blocks(rows), matrices, out=self._blocks(out))
        else:
            compute = torch.promote_types(dtype, matrices.dtype)
            for part, matrix, result in zip(
                self._blocks(rows), matrices, self._blocks(out), strict=True
            ):
                result.copy_(part.to(compute) @ matrix.to(compute))
        return out.reshape(*x.shape[:-1], self.padded_width)

    def _blocks(self, rows: Tensor) -> Tensor:
        """A view [K/B, R, B] of rows [R, K]."""
        return rows.unflatten(-1, (-1, self.block)).transpose(0, 1)


def block_transform(
    weight: Tensor, scheme: TransformScheme, inputs: InputSummary | None = None
) -> BlockTransform:
    """The transform a scheme asks for.

    Args:
        weight: [N, K]; for fused linears the stacked weight.
        scheme: rotation, smoothing exponent, permutation and block size.
        inputs: what calibration saw.  Smoothing needs the sizes of channels, the rotations that
            look at inputs their rows or second moment; a permutation ranks channels by their size
            (weight energy is used without it).

    Returns:
        The transform, its matrix already rounded to what bfloat16 can hold (an identity when the
        scheme asks for nothing; callers skip it then).

    Raises:
        NonFiniteError: NaN or Inf in ``weight`` or ``inputs``.
        ValueError: shapes do not match, something of the inputs is missing, or a Hadamard matrix
            of a block that is not a power of two.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    require_finite(weight, "weight")
    width = weight.shape[1]
    sizes = None if inputs is None else _channel_sizes(inputs, scheme, width)
    factor = torch.ones(width, dtype=torch.float64, device=weight.device)
    if scheme.smoothing is not None:
        if sizes is None:
            raise ValueError("smoothing needs the rms of the input channels from calibration")
        factors = smoothquant_factors if scheme.magnitude == "max" else smoothing_factors
        factor = factors(sizes, weight, scheme.smoothing)
    padded = padded_width(width, scheme.block)
    factor = F.pad(factor, (0, padded - width), value=1.0)
    weight = pad_to_block(weight, scheme.block)

    order = torch.arange(padded, device=weight.device)
    if scheme.permutation == "snake":
        ranking = column_rms(weight) * factor
        if sizes is not None:
            ranking = pad_to_block(sizes.to(torch.float64), scheme.block) / factor
        order = snake_permutation(ranking.square(), scheme.block)

    matrices: list[Tensor] = []
    for channels in order.split(scheme.block):
        c = factor[channels]
        block = _Block(weight[:, channels].to(torch.float64) * c, channels, c, inputs)
        matrices.append(_mixing(block, scheme) / c.unsqueeze(-1))
    return BlockTransform(
        bfloat16_representable(torch.stack(matrices)),
        None if scheme.permutation == "none" else order,
        scheme.block,
        width,
    )


def _channel_sizes(inputs: InputSummary, scheme: TransformScheme, width: int) -> Tensor:
    """The sizes [K] that smoothing and permutation go by."""
    sizes = inputs.maxima if scheme.magnitude == "max" else inputs.rms
    if sizes is None:
        raise ValueError("magnitude 'max' needs the largest magnitudes of the input channels")
    what = "maxima" if scheme.magnitude == "max" else "rms"
    if sizes.shape != (width,):
        raise ValueError(f"the input's channel {what} must be [{width}], got {list(sizes.shape)}")
    require_finite(sizes, f"the input's channel {what}")
    return sizes


@dataclass(frozen=True)
class _Block:
    """One block of a site, smoothed.

    ``weight`` is [N, B], already times c; ``channels`` [B] are its input channels, which may lie
    in the padding, and ``factor`` [B] their c.
    """

    weight: Tensor
    channels: Tensor
    factor: Tensor
    inputs: InputSummary | None

    def rows(self) -> Tensor:
        """Sampled inputs [R, B], smoothed."""
        if self.inputs is None or self.inputs.rows is None:
            raise ValueError("a greedy rotation needs sampled inputs from calibration")
        rows = self.inputs.rows
        real = self.channels < rows.shape[1]
        shape = (rows.shape[0], len(self.channels))
        found = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        found[:, real] = rows[:, self.channels[real]].to(torch.float64)
        return found / self.factor

    def moment(self) -> Tensor:
        """Second moment [B, B] of the inputs, smoothed."""
        if self.inputs is None or self.inputs.moment is None:
            raise ValueError("a second-moment transform needs the second moment from calibration")
        moment, size = self.inputs.moment, len(self.channels)
        real = self.channels < moment.shape[0]
        known = self.channels[real]
        found = torch.zeros((size, size), dtype=torch.float64, device=moment.device)
        found[real.unsqueeze(-1) & real] = moment[known][:, known].to(torch.float64).flatten()
        return found / (self.factor * self.factor.unsqueeze(-1))


def _mixing(block: _Block, scheme: TransformScheme) -> Tensor:
    """What mixes the smoothed channels of one block, [B, B]."""
    size = block.weight.shape[1]
    if scheme.rotation == "none":
        return torch.eye(size, dtype=torch.float64, device=block.weight.device)
    if scheme.rotation == "greedy":
        return greedy_rotation(block.rows())
    if scheme.rotation == "second_moment":
        weights, inputs = block.weight.t() @ block.weight, block.moment()
        return second_moment_map(
            shrunk(weights, scheme.shrinkage), shrunk(inputs, scheme.shrinkage)
        )
    if scheme.rotation == "svd":
        return svd_basis(block.weight)
    flat = hadamard(size).to(block.weight.device)
    return flat if scheme.rotation == "hadamard" else svd_basis(block.weight) @ flat


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
