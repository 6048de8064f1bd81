"""Integer activations: scales and rounding.

x ≈ q · scale with q in [-2^(b-1), 2^(b-1) - 1], rounded half to even (``torch.round``).  Where the
scale may vary decides what an integer product can do with it:

* **per token** (dynamic): one number per row, absmax / 7 for four bits, computed at run time.
  The largest of many rotated channels lies far out: of 512 normal values at 3σ, where four bits
  would best end at 2.3σ.  ``clip`` < 1 ends the range at that share of it;
* **per step** (static): one number per denoising step, found by a search that trades clipping
  against resolution, so that nothing has to be reduced while the action head runs.  Steps are
  points on the flow-time axis t ∈ [0, 1]; other step counts interpolate;
* **per channel and step** (static): a quantile of abs(x'_j) over 7 (arXiv 2605.28803).  It lies on
  the contraction axis, so it exists in simulations only.

The search for the static scale is exact over its candidates and cheap: with the samples sorted
and prefix sums of n, x and x² at hand, rounding at scale s splits them into one interval per
integer q and costs Σ_q (Σx² - 2 q s Σx + q² s² n), a lookup of 2^b boundaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.quantization.checks import require_finite
from omega_qvla.quantization.weights import integer_range

_TINY = 1e-30
_SMALLEST_RATIO = 1e-3
_COARSE, _FINE = 192, 64
_CHUNK_ELEMENTS = 1 << 22


def per_token_scale(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Dynamic scale of each row: clip · absmax over the largest integer, 1 for rows of zeros.

    Args:
        x: [..., K].
        bits: integer width.
        clip: in (0, 1].

    Returns:
        [..., 1] float32, positive; NaN or Inf in a row shows in its scale.
    """
    scale = x.abs().amax(dim=-1, keepdim=True).to(torch.float32) / integer_range(bits)[1]
    return torch.where(scale <= _TINY, torch.ones_like(scale), scale * clip)


def per_token_clip_mse(samples: Tensor, bits: int) -> float:
    """The share of each row's largest magnitude that gives the least squared rounding error.

    How far the largest of many values lies out depends on their number and distribution, so it
    differs from site to site: of 128 normal values at 2.7σ, of 16384 at 4σ.

    Args:
        samples: [R, K] transformed activations.
        bits: integer width.

    Returns:
        The best of 0.40 … 1.00 in steps of 0.05, then the best within 0.04 of it in steps of 0.01;
        1.0 if all samples are zero.

    Raises:
        NonFiniteError: NaN or Inf in ``samples``.
        ValueError: no samples.
    """
    if samples.numel() == 0:
        raise ValueError("a clip needs at least one sample")
    require_finite(samples, "activations")
    full = per_token_scale(samples, bits)

    def error(percent: int) -> float:
        return _squared_error(samples, full * (percent / 100), bits)

    coarse = min(range(100, 39, -5), key=error)
    return min(range(min(coarse + 4, 100), coarse - 5, -1), key=error) / 100


def _squared_error(samples: Tensor, scale: Tensor, bits: int) -> float:
    rows = max(1, _CHUNK_ELEMENTS // samples.shape[-1])
    parts = zip(samples.split(rows), scale.split(rows), strict=True)
    errors = ((round_activations(x, s, bits) * s - x).square_().sum() for x, s in parts)
    return sum(float(error) for error in errors)


def round_activations(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """Integers of x [..., K] with a broadcastable scale, as float32; ties to even, clamped."""
    low, high = integer_range(bits)
    return (x.to(torch.float32) / scale).round_().clamp_(low, high)


def quantize_activation(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    """The same as int8."""
    return round_activations(x, scale, bits).to(torch.int8)


def dequantize_activation(integers: Tensor, scale: Tensor | float) -> Tensor:
    """Integers [..., K] times a broadcastable scale, float32."""
    return integers.to(torch.float32) * scale


def static_scale_mse(samples: Tensor, bits: int) -> float:
    """The one scale with the smallest squared rounding error over all samples.

    Clip ratios from 1 down to 1/1000 of the largest magnitude are tried on a logarithmic grid
    (192 points), then 64 points between the neighbours of the best.

    Args:
        samples: [R, K] (any shape) of transformed activations.
        bits: integer width.

    Returns:
        A positive number, float32-representable; 1.0 if all samples are zero.

    Raises:
        NonFiniteError: NaN or Inf in ``samples``.
        ValueError: no samples.
    """
    if samples.numel() == 0:
        raise ValueError("a static scale needs at least one sample")
    require_finite(samples, "activations")
    ordered = samples.detach().reshape(-1).to(torch.float64).sort().values
    largest = float(torch.maximum(-ordered[0], ordered[-1])) / integer_range(bits)[1]
    if largest <= _TINY:
        return 1.0
    zero = ordered.new_zeros(1)
    sums = torch.cat((zero, ordered.cumsum(0)))
    squares = torch.cat((zero, ordered.square().cumsum(0)))

    exponents = torch.linspace(0.0, 1.0, _COARSE, dtype=torch.float64, device=samples.device)
    coarse = largest * _SMALLEST_RATIO**exponents
    best = int(_interval_error(ordered, sums, squares, coarse, bits).argmin())
    low, high = coarse[min(best + 1, _COARSE - 1)], coarse[max(best - 1, 0)]
    fine = low + (high - low) * torch.linspace(
        0.0, 1.0, _FINE, dtype=torch.float64, device=samples.device
    )
    candidates = torch.cat((coarse[best : best + 1], fine)).to(torch.float32).to(torch.float64)
    error = _interval_error(ordered, sums, squares, candidates, bits)
    return float(candidates[int(error.argmin())])


def _interval_error(
    ordered: Tensor, sums: Tensor, squares: Tensor, scales: Tensor, bits: int
) -> Tensor:
    """Total squared rounding error of sorted samples [n] at each scale [C] → [C]."""
    low, high = integer_range(bits)
    levels = torch.arange(low, high + 1, dtype=torch.float64, device=ordered.device)
    # A sample exactly between two integers costs the same on either side, so ties do not matter.
    edges = (levels[:-1] + 0.5) * scales.unsqueeze(-1)
    inner = torch.searchsorted(ordered, edges)
    first = torch.zeros_like(inner[:, :1])
    cut = torch.cat((first, inner, first + ordered.numel()), dim=1)
    count = cut.diff(dim=1).to(torch.float64)
    total, square = sums[cut].diff(dim=1), squares[cut].diff(dim=1)
    value = levels * scales.unsqueeze(-1)
    return (square - 2.0 * value * total + value.square() * count).sum(dim=1)


def channel_quantile_scale(samples: Tensor, quantile: float, bits: int) -> Tensor:
    """Static scale of every channel: a quantile of its magnitude over the largest integer.

    Quantiles interpolate linearly between samples.  A channel whose quantile is zero although it
    is not always zero uses its largest magnitude; a channel of zeros gets 1.

    Args:
        samples: [R, K] transformed activations of one denoising step.
        quantile: in (0, 1].
        bits: integer width.

    Returns:
        [K] float32, positive.

    Raises:
        NonFiniteError: NaN or Inf in ``samples``.
        ValueError: no samples, or a quantile out of range.
    """
    if samples.ndim != 2 or samples.shape[0] == 0:
        raise ValueError(f"a channel scale needs samples [R, K], got {list(samples.shape)}")
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"the quantile must be in (0, 1], got {quantile}")
    require_finite(samples, "activations")
    chunk = max(1, _CHUNK_ELEMENTS // samples.shape[0])
    parts: list[Tensor] = []
    for part in samples.split(chunk, dim=1):
        ordered = part.abs().to(torch.float32).sort(dim=0).values
        position = quantile * (samples.shape[0] - 1)
        below = int(position)
        above = min(below + 1, samples.shape[0] - 1)
        value = torch.lerp(ordered[below], ordered[above], position - below)
        parts.append(torch.where(value > _TINY, value, ordered[-1]))
    scale = torch.cat(parts) / integer_range(bits)[1]
    return torch.where(scale > _TINY, scale, torch.ones_like(scale))
