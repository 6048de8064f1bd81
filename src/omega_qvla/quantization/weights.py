"""Integer weights: symmetric scales, round to nearest, and GPTQ.

A weight W [N, K] is stored as integers Q in [-2^(b-1), 2^(b-1) - 1] and one positive scale per
output channel, or per group of input channels: W ≈ Q · scale.  Output channels may keep their own
scale because it does not lie on the contraction axis.

**What rounding should minimise** is not ‖W - Ŵ‖² but the error of the output on real inputs,
tr(E H Eᵀ) with E = W - Ŵ and H = Σ xᵀx; divided by tr(W H Wᵀ) it is the *proxy loss*.

**GPTQ** (Frantar et al., arXiv 2210.17323, section 3) fixes input channels one after the other.
After rounding channel i the best response of the channels still free is

    W_:k ← W_:k - (W_:i - Ŵ_:i) · U_ik / U_ii      for k > i,   H⁻¹ = Uᵀ U, U upper triangular.

Row i of U carries exactly the inverse Hessian of the channels i … K-1 with the earlier ones
eliminated, so one factorization serves all steps.  U is obtained without forming H⁻¹: reversing
rows and columns of H, factoring it as L Lᵀ and reversing L gives H = R Rᵀ with R upper triangular,
and U = R⁻¹.  That needs one Cholesky instead of two and loses half as many digits.

Updates inside 128 channels are applied at once, those to all later channels as one matrix product
per 128 (the paper's lazy batches); the result is that of the naive loop.  The working layout is
transposed, [K, rows], so that a channel is contiguous; rows are independent and processed in
chunks to bound memory.

Precision: factorization and weights in float64 up to K = 1024, above that in float32, where the
factor is accepted only if H⁻¹ = Uᵀ U holds on a probe vector; otherwise float64 is used after all.
The Hessian is reversed, factored and inverted in one matrix: at K = 16384 each is a gigabyte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from omega_qvla.quantization.checks import require_finite
from omega_qvla.recipe import WeightScheme

GPTQ_BLOCK = 128
FLOAT64_WIDTH = 1024
MAX_DAMPING_RAISES = 5
_CHUNK_ELEMENTS = 1 << 22
_GPU_CHUNK_ELEMENTS = 1 << 26
"""Weights propagated at a time on a GPU, where every channel costs some launches however many the
rows; in float64 they take 512 MB."""
_TINY = 1e-30
"""Magnitudes below this count as zero: their scale would leave the range of normal floats."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Integers and scales of one weight.

    Attributes:
        integers: [N, K] int8.
        scale: [N] float32, or [N, ceil(K/group)] with groups; always positive.
        group: input channels per scale, None for one scale per output channel.
        note: what did not go by the book (raised damping, fallback); None when all did.
    """

    integers: Tensor
    scale: Tensor
    group: int | None = None
    note: str | None = None

    def dequantize(self) -> Tensor:
        """[N, K] float32, integers times scale."""
        scale = _spread_scale(self.scale, self.integers.shape[1], self.group)
        return self.integers.to(torch.float32) * scale


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed width: (-8, 7) for 4 bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _spread_scale(scale: Tensor, width: int, group: int | None) -> Tensor:
    """Scale broadcastable against [N, width]."""
    if group is None:
        return scale.unsqueeze(-1)
    return scale.repeat_interleave(group, dim=1)[:, :width]


def symmetric_scale(
    weight: Tensor, bits: int, method: Literal["max", "mse"], group: int | None = None
) -> Tensor:
    """Scales that map a weight onto signed integers.

    ``max`` puts the largest magnitude on the largest integer.  ``mse`` searches the clip ratio
    that minimises the squared rounding error of each row (or group): 0.40 … 1.00 in steps of 0.05,
    then ±0.04 around the best in steps of 0.01.  Rows of zeros get 1.

    Args:
        weight: [N, K], any floating dtype.
        bits: integer width.
        method: ``max`` or ``mse``.
        group: input channels per scale; the last group may be shorter.

    Returns:
        [N] float32, or [N, ceil(K/group)] with groups.  Memory beyond that is bounded (a few
        times 4 M elements) whatever the shape.

    Raises:
        NonFiniteError: NaN or Inf in ``weight``.
    """
    require_finite(weight, "weight")
    rows, width = weight.shape
    if group is not None:
        missing = -width % group
        weight = F.pad(weight, (0, missing)) if missing else weight
        weight = weight.reshape(-1, group)
    chunk = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    parts = [_row_scale(part, bits, method) for part in weight.split(chunk)]
    scale = torch.cat(parts) if parts else weight.new_ones(0)
    scale = scale.to(torch.float32)
    return scale if group is None else scale.reshape(rows, -1)


def _row_scale(weight: Tensor, bits: int, method: Literal["max", "mse"]) -> Tensor:
    """Scale of each row of [n, K] → [n]."""
    weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    largest_integer = integer_range(bits)[1]
    full = weight.abs().amax(dim=1) / largest_integer
    full = torch.where(full > _TINY, full, torch.ones_like(full))
    if method == "max":
        return full
    # Squares of errors leave float32's range where weights are below 1e-19 or above 1e19: search on
    # rows brought near 1 by a power of two, which changes no bit of the result.
    exponent = torch.frexp(full).exponent
    weight, full = torch.ldexp(weight, -exponent.unsqueeze(-1)), torch.ldexp(full, -exponent)
    best_ratio = torch.ones_like(full)
    best_error = _rounding_error(weight, full, bits)

    def consider(ratio: Tensor) -> None:
        error = _rounding_error(weight, full * ratio, bits)
        better = error < best_error
        best_error[better] = error[better]
        best_ratio[better] = ratio[better]

    for step in range(1, 13):
        consider(torch.full_like(full, 1.0 - 0.05 * step))
    centre = best_ratio.clone()
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        consider(centre + 0.01 * step)
    return torch.ldexp(full * best_ratio, exponent)


def _rounding_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Squared error per row of rounding [n, K] with scale [n]."""
    low, high = integer_range(bits)
    column = scale.unsqueeze(-1)
    error = (weight / column).round_().clamp_(low, high).mul_(column).sub_(weight)
    return error.square_().sum(dim=1)


def round_to_nearest(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Round every weight to its nearest integer (ties to even), independently.

    Args:
        weight: [N, K].
        scheme: bits, scale method and group; ``rounding`` and ``damping`` are not read.

    Raises:
        NonFiniteError: NaN or Inf in ``weight``.
    """
    scale = symmetric_scale(weight, scheme.bits, scheme.scale, scheme.group)
    low, high = integer_range(scheme.bits)
    chunk = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, weight.shape[0], chunk):
        rows = slice(start, start + chunk)
        column = _spread_scale(scale[rows], weight.shape[1], scheme.group)
        integers[rows] = (weight[rows].to(torch.float32) / column).round().clamp(low, high)
    return QuantizedWeight(integers, scale, scheme.group)


def quantize_weight(
    weight: Tensor, scheme: WeightScheme, hessian: Tensor | None = None
) -> QuantizedWeight:
    """Quantize as the scheme says; ``hessian`` [K, K] is required for GPTQ and else not read."""
    if scheme.rounding == "nearest":
        return round_to_nearest(weight, scheme)
    if hessian is None:
        raise ValueError("GPTQ needs the second moment of the inputs")
    return gptq(weight, hessian, scheme)


def gptq(weight: Tensor, hessian: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize with error propagation to all later input channels.

    The Hessian is divided by the mean of its live diagonal and ``scheme.damping`` added to the
    diagonal.  A dead channel (H_jj = 0) has its weights set to zero and H_jj to one.  If the
    factorization fails the damping is raised tenfold, at most five times, then the weight is
    rounded to nearest; either is recorded in ``note``.  A Hessian without any live channel
    says nothing about the inputs and also falls back.

    With ``scheme.order`` channels are rounded from the largest H_jj to the smallest (GPTQ's public
    code calls it act-order); what is stored is in the order of the weight.

    Scales are chosen on the given weight (per output channel), or when a group is reached, on the
    weights as updated so far.

    Args:
        weight: [N, K].
        hessian: [K, K] second moment of the inputs, symmetric; its overall scale is irrelevant.
        scheme: bits, scale method, group and damping.

    Raises:
        NonFiniteError: NaN or Inf in ``weight`` or ``hessian``.
        ValueError: shapes do not match.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"GPTQ needs weight [N, K] and hessian [K, K], got {list(weight.shape)} "
            f"and {list(hessian.shape)}"
        )
    require_finite(weight, "weight")
    require_finite(hessian, "the Hessian")
    if scheme.order == "energy":
        order = hessian.diagonal().argsort(descending=True, stable=True)
        stored = scheme.model_copy(update={"order": "stored"})
        found = gptq(weight[:, order], hessian[order][:, order], stored)
        return replace(found, integers=found.integers[:, order.argsort()])
    coupling, dead, note = _coupling(hessian, scheme.damping)
    if coupling is None:
        nearest = round_to_nearest(weight, scheme)
        return QuantizedWeight(nearest.integers, nearest.scale, nearest.group, note)

    weight = torch.where(dead, torch.zeros_like(weight), weight)
    scale = None
    if scheme.group is None:
        scale = symmetric_scale(weight, scheme.bits, scheme.scale)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales: list[Tensor] = []
    most = _CHUNK_ELEMENTS if weight.device.type == "cpu" else _GPU_CHUNK_ELEMENTS
    chunk = max(1, most // weight.shape[1])
    for start in range(0, weight.shape[0], chunk):
        rows = slice(start, start + chunk)
        channels = weight[rows].t().to(coupling.dtype).contiguous()
        chunk_scale = None if scale is None else scale[rows]
        out, used = _propagate(channels, coupling, chunk_scale, scheme)
        integers[rows] = out.t()
        scales.append(used)
    return QuantizedWeight(integers, torch.cat(scales), scheme.group, note)


def _propagate(
    channels: Tensor, coupling: Tensor, scale: Tensor | None, scheme: WeightScheme
) -> tuple[Tensor, Tensor]:
    """Round one channel after the other, spreading each error over the later ones.

    Args:
        channels: [K, n] transposed weight; overwritten.
        coupling: [K, K], U_ik / U_ii.
        scale: [n] float32 per output channel, or None to choose scales per group.
        scheme: bits, scale method and group.

    Returns:
        Integers [K, n] int8, and the scale [n] or [n, groups].
    """
    low, high = integer_range(scheme.bits)
    width = channels.shape[0]
    group = scheme.group or width
    # Blocks end where groups end, so that a group's weights are up to date when it starts.
    block = GPTQ_BLOCK if scheme.group is None else max(1, GPTQ_BLOCK // group) * group
    integers = torch.empty(channels.shape, dtype=torch.int8, device=channels.device)
    group_scales: list[Tensor] = []
    divisor = None if scale is None else scale.to(channels.dtype)
    for start in range(0, width, block):
        end = min(start + block, width)
        errors = torch.empty_like(channels[start:end])
        for i in range(start, end):
            if scale is None and i % group == 0:
                part = channels[i : min(i + group, width)].t()
                group_scales.append(symmetric_scale(part, scheme.bits, scheme.scale))
                divisor = group_scales[-1].to(channels.dtype)
            assert divisor is not None
            rounded = (channels[i] / divisor).round_().clamp_(low, high)
            integers[i] = rounded.to(torch.int8)
            error = torch.sub(channels[i], rounded.mul_(divisor), out=errors[i - start])
            channels[i + 1 : end].addr_(coupling[i, i + 1 : end], error, alpha=-1.0)
        if end < width:
            channels[end:].addmm_(coupling[start:end, end:].t(), errors, alpha=-1.0)
    return integers, scale if scale is not None else torch.stack(group_scales, dim=1)


def _coupling(hessian: Tensor, damping: float) -> tuple[Tensor | None, Tensor, str | None]:
    """Row-normalised Cholesky factor of the inverse Hessian.

    Returns:
        U_ik / U_ii [K, K] (None when there is none), dead channels [K] bool, and a note.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        return None, dead, "rounded to nearest: no input channel was active in calibration"
    mean = float(diagonal[~dead].to(torch.float64).mean())
    if mean <= 0.0:
        return None, dead, "rounded to nearest: the Hessian's diagonal is not positive"
    narrow = hessian.shape[0] <= FLOAT64_WIDTH
    dtypes = (torch.float64,) if narrow else (torch.float32, torch.float64)
    for raises in range(MAX_DAMPING_RAISES + 1):
        damped = damping * 10.0**raises
        added = torch.full_like(diagonal, damped, dtype=torch.float64)
        added[dead] += 1.0
        for dtype in dtypes:
            normal = hessian.to(dtype, copy=True, memory_format=torch.contiguous_format)
            normal.div_(mean)
            normal.diagonal().add_(added.to(dtype))
            factor = _inverse_factor(normal)
            if factor is not None and _inverts(factor, hessian, mean, added):
                note = f"damping raised from {damping:g} to {damped:g}" if raises else None
                return factor.div_(factor.diagonal().clone().unsqueeze(-1)), dead, note
            del normal, factor
    return (
        None,
        dead,
        (
            f"rounded to nearest: the Hessian is not positive definite even with damping "
            f"{damping * 10.0**MAX_DAMPING_RAISES:g}"
        ),
    )


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U of H⁻¹ = UᵀU for a symmetric [K, K], in its place; None if H is not positive definite."""
    _reverse(hessian)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    # The upper factor of the symmetric matrix's transpose is, read by rows, the lower one.
    transposed = hessian.t()
    torch.linalg.cholesky_ex(transposed, upper=True, out=(transposed, info))
    return None if int(info) != 0 else _invert_upper(_reverse(hessian))


def _inverts(factor: Tensor, hessian: Tensor, mean: float, added: Tensor) -> bool:
    """Whether H⁻¹ = UᵀU holds on a probe vector, H being ``hessian`` / mean + diag(added).

    In float64 whatever U is stored in: a single strong direction shared by all channels makes H
    thousands of times larger along it, and a float32 product would lose more digits here than the
    factor has lost.
    """
    probe = torch.ones(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    probe[1::2] = -1.0
    inverse = _transposed_product(factor, _product(factor, probe))
    residual = _product(hessian, inverse) / mean + added * inverse - probe
    # A NaN residual fails this comparison too.
    return bool(residual.norm() <= 1e-2 * probe.norm())


def _product(matrix: Tensor, vector: Tensor, rows: int = 1024) -> Tensor:
    """matrix [K, K] times a float64 vector, widened a few rows at a time."""
    return torch.cat([part.to(torch.float64) @ vector for part in matrix.split(rows)])


def _transposed_product(matrix: Tensor, vector: Tensor, rows: int = 1024) -> Tensor:
    """The transpose of matrix [K, K] times a float64 vector, widened a few rows at a time."""
    total = torch.zeros_like(vector)
    for part, of_rows in zip(matrix.split(rows), vector.split(rows), strict=True):
        total += part.to(torch.float64).t() @ of_rows
    return total


def _reverse(matrix: Tensor, chunk: int = 1 << 22) -> Tensor:
    """Reverse the order of rows and of columns of a contiguous matrix, in place."""
    flat = matrix.view(-1)  # both orders reversed are all elements in reverse
    count = flat.shape[0]
    for start in range(0, count // 2, chunk):
        end = min(start + chunk, count // 2)
        head, tail = flat[start:end], flat[count - end : count - start]
        flipped = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(flipped)
    return matrix


def _invert_upper(upper: Tensor, tile: int = 2048) -> Tensor:
    """Inverse X of an upper triangular R [K, K], in place, a column of tiles at a time.

    From X R = 1:  X_jj = R_jj⁻¹,  X_{<j,j} = -X_{<j,<j} R_{<j,j} X_jj, where X_{<j,<j} stands where
    R_{<j,<j} stood.  Nothing but a column of tiles is ever copied.
    """
    for start in range(0, upper.shape[0], tile):
        end = min(start + tile, upper.shape[0])
        diagonal = upper[start:end, start:end]
        identity = torch.eye(end - start, dtype=upper.dtype, device=upper.device)
        diagonal.copy_(torch.linalg.solve_triangular(diagonal, identity, upper=True))
        if start:
            above = upper[:start, start:end]
            above.copy_((upper[:start, :start] @ above) @ diagonal).neg_()
    return upper


def proxy_loss(weight: Tensor, quantized: QuantizedWeight | Tensor, hessian: Tensor) -> float:
    """Relative squared output error of a quantized weight, tr(E H Eᵀ) / tr(W H Wᵀ).

    Args:
        weight: [N, K].
        quantized: what stands in for it, quantized or already dequantized [N, K].
        hessian: [K, K] second moment of the inputs.

    Returns:
        The ratio; 0 when both traces are zero.  Products in float64 up to K = 1024, above in
        float32 summed in float64.
    """
    approximate = quantized if isinstance(quantized, Tensor) else quantized.dequantize()
    dtype = torch.float64 if weight.shape[1] <= FLOAT64_WIDTH else torch.float32
    hessian = hessian.to(dtype)
    chunk = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    error, energy = 0.0, 0.0
    for start in range(0, weight.shape[0], chunk):
        full = weight[start : start + chunk].to(dtype)
        difference = full - approximate[start : start + chunk].to(dtype)
        error += float(((difference @ hessian) * difference).sum(dtype=torch.float64))
        energy += float(((full @ hessian) * full).sum(dtype=torch.float64))
    if energy <= 0.0:
        return 0.0 if error <= 0.0 else float("inf")
    return error / energy
