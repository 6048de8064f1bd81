"""Quantize one site: from weight, scheme and statistics to integers, scales and transform.

For y = x Wᵀ + b with a block transform T:  x' = x T,  W' = W T⁻ᵀ,  so x' W'ᵀ = x Wᵀ.  Both x' and
W' are then rounded to integers, q_x ≈ x'/s_x and q_w ≈ W'/s_w, and

    y_n ≈ s_x · s_w[n] · Σ_k q_x[k] q_w[n,k] + b_n

with an integer sum.  That works because s_x does not depend on k and s_w only on n (or on a group
of k, which splits the sum).  A low-rank branch, where a scheme asks for one, is multiplied beside
that sum in 16 bits (``low_rank.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from omega_qvla.calibration.capture import SiteStatistics
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.policies.base import QuantizationSite
from omega_qvla.quantization.activations import (
    channel_quantile_scale,
    per_token_scale,
    round_activations,
    static_scale_mse,
)
from omega_qvla.quantization.low_rank import LowRankBranch, low_rank_branch
from omega_qvla.quantization.transforms import (
    BlockTransform,
    InputSummary,
    OutputRotation,
    block_transform,
    output_rotation,
)
from omega_qvla.quantization.weights import (
    QuantizedWeight,
    gptq,
    proxy_loss,
    round_to_nearest,
)
from omega_qvla.recipe import ActivationScheme, Scheme

_SAME_TIME = 1e-6
"""Flow times closer than this are one time."""

_ROWS = 512
"""Sampled inputs that a transform looks at."""


@dataclass(frozen=True)
class QuantizedSite:
    """One quantized site.

    Attributes:
        site: which linears, in which part of the policy.
        in_features: input width K before padding.
        splits: output widths of the fused linears; their sum is N.
        weight: integers and scales of W', [N, K'] with K' = K padded to whole blocks.
        weight_bits: width of the weight integers.
        transform: T, or None when the input is used as it is.
        bias: [N] float32 or None.
        activations: the activation scheme; ``per_step_or_token`` has become one of the two.
        activation_scale: static scales: [steps] (per_step), [steps, K'] (per_channel_per_step),
            or None (per_token).
        activation_times: [steps] flow time of each static scale, descending, or None.
        output_rotation: rotation of the output undone after the product (simulation only).
        low_rank: a 16-bit branch whose output is added, or None; ``weight`` is what it leaves.
        proxy_loss: relative error tr(E H Eᵀ)/tr(W H Wᵀ) of the rounded weight; None unmeasured.
        note: anything unusual that happened (raised damping, fallback); empty otherwise.
    """

    site: QuantizationSite
    in_features: int
    splits: tuple[int, ...]
    weight: QuantizedWeight
    weight_bits: int
    transform: BlockTransform | None
    bias: Tensor | None
    activations: ActivationScheme
    activation_scale: Tensor | None
    activation_times: Tensor | None
    output_rotation: OutputRotation | None = None
    low_rank: LowRankBranch | None = None
    proxy_loss: float | None = None
    note: str = ""


def needs_statistics(scheme: Scheme) -> bool:
    """Whether a scheme looks at activations at all."""
    return (
        scheme.transform.needs_statistics
        or scheme.weights.rounding == "gptq"
        or scheme.activations.scale != "per_token"
    )


def quantize_site(
    site: QuantizationSite,
    linears: Sequence[nn.Linear],
    scheme: Scheme,
    statistics: SiteStatistics | None,
) -> QuantizedSite:
    """Quantize the linears of one site together.

    Args:
        site: the site.
        linears: its full-precision linears, in the site's order.
        scheme: what to do.
        statistics: of the site's input; None is allowed if ``needs_statistics`` is false.  Their
            second moment is used up.

    Raises:
        NonFiniteError: a weight is NaN or Inf; names the linear.
    """
    weight, bias = _stack(site, linears)
    transform = None
    if not scheme.transform.identity:
        inputs = None if statistics is None else _summary(statistics, scheme)
        transform = block_transform(weight, scheme.transform, inputs)
    branch = None
    if scheme.weights.low_rank is not None:
        branch = low_rank_branch(weight, transform, scheme.weights.low_rank)
    left = weight if branch is None else branch.residual(weight)
    folded = left if transform is None else transform.fold(left)
    undo = None
    if scheme.transform.output_rotation:
        undo = output_rotation(folded, scheme.transform.block)
        folded = undo.fold(folded)
    hessian = None if statistics is None else _hessian(statistics, transform)
    if scheme.weights.rounding == "gptq":
        if hessian is None:
            raise ValueError("GPTQ needs statistics")
        quantized = gptq(folded, hessian, scheme.weights)
    else:
        quantized = round_to_nearest(folded, scheme.weights)
    activations = scheme.activations
    if activations.scale == "per_step_or_token":
        activations = _better_scale(activations, quantized, statistics, transform)
    scale, times = _static_scales(activations, statistics, transform)
    return QuantizedSite(
        site=site,
        in_features=weight.shape[1],
        splits=tuple(linear.out_features for linear in linears),
        weight=quantized,
        weight_bits=scheme.weights.bits,
        transform=transform,
        bias=bias,
        activations=activations,
        activation_scale=scale,
        activation_times=times,
        output_rotation=undo,
        low_rank=branch,
        proxy_loss=None if hessian is None else proxy_loss(folded, quantized, hessian),
        note=quantized.note or "",
    )


def transform_rows(rows: Tensor, transform: BlockTransform | None) -> Tensor:
    """x [..., K] → x' [..., K']."""
    return rows if transform is None else transform.apply(rows)


def _stack(site: QuantizationSite, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    for name, linear in zip(site.linears, linears, strict=True):
        for kind, tensor in linear.named_parameters():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{kind} of {name!r} has NaN or Inf; the checkpoint is damaged"
                )
    weight = torch.cat([linear.weight.detach().to(torch.float32) for linear in linears])
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [
        weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return weight, torch.cat([b.to(torch.float32) for b in biases])


def _summary(statistics: SiteStatistics, scheme: Scheme) -> InputSummary:
    """What the transform may look at; the rows only where it will."""
    rows = None
    if scheme.transform.rotation == "greedy":
        rows = torch.cat([statistics.rows(step) for step in statistics.steps])
        rows = rows[:: -(-rows.shape[0] // _ROWS)]
    return InputSummary(statistics.rms, statistics.maxima, statistics.second_moment, rows)


def _hessian(statistics: SiteStatistics, transform: BlockTransform | None) -> Tensor:
    moment = statistics.take_moment()
    return moment if transform is None else transform.second_moment(moment)


def _better_scale(
    scheme: ActivationScheme,
    weight: QuantizedWeight,
    statistics: SiteStatistics | None,
    transform: BlockTransform | None,
) -> ActivationScheme:
    """``per_step`` or ``per_token``, by Σ ‖(Q(x') − x') Ŵᵀ‖² over the sampled rows of all steps.

    Ties go to the static scale, which costs nothing at run time.
    """
    if statistics is None:
        raise ValueError("choosing an activation scale needs statistics")
    dequantized = weight.dequantize()
    static, dynamic = 0.0, 0.0
    for step in statistics.steps:
        rows = transform_rows(statistics.rows(step), transform)
        fixed = torch.tensor(static_scale_mse(rows, scheme.bits))
        for scale in (fixed, per_token_scale(rows, scheme.bits, scheme.clip)):
            error = round_activations(rows, scale, scheme.bits) * scale - rows
            size = float((error @ dequantized.t()).square().sum(dtype=torch.float64))
            if scale.ndim:
                dynamic += size
            else:
                static += size
    return scheme.model_copy(update={"scale": "per_step" if static <= dynamic else "per_token"})


def _static_scales(
    scheme: ActivationScheme,
    statistics: SiteStatistics | None,
    transform: BlockTransform | None,
) -> tuple[Tensor | None, Tensor | None]:
    if scheme.scale == "per_token":
        return None, None
    if statistics is None:
        raise ValueError("static activation scales need statistics")
    steps = sorted(statistics.steps, key=lambda step: statistics.times[step], reverse=True)
    for earlier, later in pairwise(steps):
        if statistics.times[earlier] - statistics.times[later] <= _SAME_TIME:
            raise PolicyError(
                f"denoising steps {earlier} and {later} have the same flow time "
                f"{statistics.times[later]} at {statistics.site.name!r}; per-step scales need "
                "`with clock.step(i, t):` with a t of its own for every step"
            )
    scales = []
    for step in steps:
        rows = transform_rows(statistics.rows(step), transform)
        if scheme.scale == "per_step":
            scales.append(torch.tensor(static_scale_mse(rows, scheme.bits)))
        else:
            scales.append(channel_quantile_scale(rows, scheme.quantile, scheme.bits))
    times = torch.tensor([statistics.times[step] for step in steps])
    return torch.stack(scales).to(torch.float32), times.to(torch.float32)
