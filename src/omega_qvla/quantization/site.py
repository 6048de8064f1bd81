"""Quantize one site: from weight, scheme and statistics to integers, scales and transform.

For y = x Wᵀ + b with a block transform T:  x' = x T,  W' = W T⁻ᵀ,  so x' W'ᵀ = x Wᵀ.  Both x' and
W' are then rounded to integers, q_x ≈ x'/s_x and q_w ≈ W'/s_w, and

    y_n ≈ s_x · s_w[n] · Σ_k q_x[k] q_w[n,k] + b_n

with an integer sum.  Where a scheme has `subtract_mean`, x' - o is rounded in place of x' and
b + o W'ᵀ added in place of b, o being the mean of x': the range that integers have is spent on what
varies.  That works because s_x does not depend on k and s_w only on n (or on a group
of k, which splits the sum).  A low-rank branch, where a scheme asks for one, is multiplied beside
that sum in 16 bits (``low_rank.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from omega_qvla.calibration.capture import SiteStatistics
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.flow_time import SAME_TIME
from omega_qvla.policies.base import QuantizationSite
from omega_qvla.quantization.activations import (
    channel_quantile_scale,
    per_token_clip_mse,
    per_token_scale,
    round_activations,
    static_scale_mse,
)
from omega_qvla.quantization.low_rank import LowRankBranch, low_rank_branch
from omega_qvla.quantization.prior import expected_deviation, expected_size
from omega_qvla.quantization.rounded_inputs import fit_to_rounded, noise_share
from omega_qvla.quantization.transforms import (
    BlockTransform,
    InputSummary,
    OutputRotation,
    block_transform,
    column_rms,
    output_rotation,
)
from omega_qvla.quantization.weights import (
    QuantizedWeight,
    proxy_loss,
    quantize_weight,
    round_to_nearest,
)
from omega_qvla.recipe import ActivationScheme, Scheme, WeightScheme

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
        bias: [N] float32 or None; with an offset [steps, N], its product with W' included.
        activations: the activation scheme; ``per_step_or_token`` has become one of the two.
        activation_scale: static scales: [steps] (per_step), [steps, K'] (per_channel_per_step),
            or None (per_token).
        activation_times: [steps] flow time of each static scale and offset, descending, or None.
        output_rotation: rotation of the output undone after the product (simulation only).
        low_rank: a 16-bit branch whose output is added, or None; ``weight`` is what it leaves.
        offset: [steps, K'] float32 (bfloat16 values), subtracted from x' before rounding; or None.
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
    offset: Tensor | None = None
    proxy_loss: float | None = None
    note: str = ""


def needs_statistics(scheme: Scheme) -> bool:
    """Whether a scheme looks at activations at all."""
    return (
        scheme.transform.needs_statistics
        or scheme.weights.rounding == "gptq"
        or scheme.activations.scale != "per_token"
        or scheme.activations.clip == "search"
        or scheme.activations.subtract_mean
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
    raw_rms = None if statistics is None else statistics.rms
    means = None
    if scheme.activations.subtract_mean:
        means = _required(statistics, "centring inputs").centre()
    deviation = None
    if scheme.prior == "contribution" and statistics is not None and raw_rms is not None:
        # One row per step varies around its mean in no channel: then its size is all there is.
        sizes = statistics.rms if bool((statistics.rms > 0).any()) else raw_rms
        deviation = expected_deviation(sizes, column_rms(weight))
    transform = None
    if not scheme.transform.identity:
        summary = None if statistics is None else _summary(statistics, scheme, deviation)
        transform = block_transform(weight, scheme.transform, summary)
    if statistics is not None and deviation is not None:
        statistics.expect(deviation / (statistics.observations + 1) ** 0.5)
    branch = None
    if scheme.weights.low_rank is not None:
        branch = low_rank_branch(weight, transform, scheme.weights.low_rank)
    left = weight if branch is None else branch.residual(weight)
    folded = left if transform is None else transform.fold(left)
    undo = None
    if scheme.transform.output_rotation:
        undo = output_rotation(folded, scheme.transform.block)
        folded = undo.fold(folded)
    inputs = _round_inputs(scheme.activations, folded, statistics, transform, means)
    if inputs.offset is not None:
        bias = inputs.offset @ folded.t() + (0.0 if bias is None else bias)
    noise = None
    if scheme.weights.rounding_noise:
        seen = _required(statistics, "reckoning with rounding noise")
        noise = scheme.weights.rounding_noise * _noise(inputs, seen, transform)
    hessian = None if statistics is None else _hessian(statistics, transform)
    quantized, loss = _round_weight(folded, hessian, scheme.weights, noise)
    return QuantizedSite(
        site=site,
        in_features=weight.shape[1],
        splits=tuple(linear.out_features for linear in linears),
        weight=quantized,
        weight_bits=scheme.weights.bits,
        transform=transform,
        bias=bias,
        activations=inputs.scheme,
        activation_scale=inputs.scale,
        activation_times=inputs.times,
        output_rotation=undo,
        low_rank=branch,
        offset=inputs.offset,
        proxy_loss=loss,
        note=quantized.note or "",
    )


@dataclass(frozen=True)
class _RoundedInputs:
    """How a site's inputs are rounded.

    Attributes:
        scheme: with what it leaves to calibration decided.
        scale, times, offset: as in ``QuantizedSite``.
    """

    scheme: ActivationScheme
    scale: Tensor | None
    times: Tensor | None
    offset: Tensor | None


def _round_inputs(
    scheme: ActivationScheme,
    weight: Tensor,
    statistics: SiteStatistics | None,
    transform: BlockTransform | None,
    means: dict[int, Tensor] | None,
) -> _RoundedInputs:
    """Decide scales and offsets; ``means`` were taken away from the statistics already."""
    scheme = _settled(scheme, weight, statistics, transform)
    scale, times = _static_scales(scheme, statistics, transform)
    offset = None
    if statistics is not None and means is not None:
        steps, times = _steps_and_times(statistics)
        rows = torch.stack([means[step] for step in steps])
        # In bfloat16, as it will be stored, and the bias made of that: nothing is lost by it.
        offset = transform_rows(rows, transform).to(torch.bfloat16).to(torch.float32)
    return _RoundedInputs(scheme, scale, times, offset)


def _round_weight(
    weight: Tensor, hessian: Tensor | None, scheme: WeightScheme, noise: Tensor | None
) -> tuple[QuantizedWeight, float | None]:
    """The integers, fitted to a share of the inputs' noise if one is given, and their proxy loss.

    The loss is None where there is no Hessian; a Hessian is used up.
    """
    if hessian is None:
        if scheme.rounding == "gptq":
            raise ValueError("GPTQ needs statistics")
        return round_to_nearest(weight, scheme), None
    note = None
    if noise is not None:
        weight, hessian, note = fit_to_rounded(weight, hessian, noise)
    quantized = quantize_weight(weight, scheme, hessian)
    notes = "; ".join(text for text in (note, quantized.note) if text)
    quantized = replace(quantized, note=notes or None)
    return quantized, proxy_loss(weight, quantized, hessian)


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


def _summary(statistics: SiteStatistics, scheme: Scheme, deviation: Tensor | None) -> InputSummary:
    """What the transform may look at, the expected deviation included; rows only where it will."""
    rows = None
    if scheme.transform.rotation == "greedy":
        rows = torch.cat([statistics.rows(step) for step in statistics.steps])
        rows = rows[:: -(-rows.shape[0] // _ROWS)]
    rms, maxima, moment = statistics.rms, statistics.maxima, statistics.second_moment
    if deviation is not None:
        rms, maxima = expected_size(rms, deviation), expected_size(maxima, deviation)
        if scheme.transform.rotation == "second_moment":
            moment = moment.clone()
            moment.diagonal().add_(deviation.to(moment.dtype).square(), alpha=statistics.count)
    return InputSummary(rms, maxima, moment, rows)


def _hessian(statistics: SiteStatistics, transform: BlockTransform | None) -> Tensor:
    moment = statistics.take_moment()
    return moment if transform is None else transform.second_moment(moment)


def _required(statistics: SiteStatistics | None, what: str) -> SiteStatistics:
    if statistics is None:
        raise ValueError(f"{what} needs statistics")
    return statistics


def _noise(
    inputs: _RoundedInputs, statistics: SiteStatistics, transform: BlockTransform | None
) -> Tensor:
    """``noise_share`` of the sampled rows of all steps, rounded as the site will round them."""
    exact: list[Tensor] = []
    rounded: list[Tensor] = []
    for number, step in enumerate(_steps_and_times(statistics)[0]):
        rows = transform_rows(statistics.rows(step), transform)
        if inputs.scale is None:
            scale = per_token_scale(rows, inputs.scheme.bits, inputs.scheme.share)
        else:
            scale = inputs.scale[number]
        exact.append(rows)
        rounded.append(round_activations(rows, scale, inputs.scheme.bits) * scale)
    return noise_share(torch.cat(exact), torch.cat(rounded))


def _steps_and_times(statistics: SiteStatistics) -> tuple[list[int], Tensor]:
    """Steps in the order of falling flow time, and these times, float32.

    Raises:
        PolicyError: two steps have the same time.
    """
    steps = sorted(statistics.steps, key=lambda step: statistics.times[step], reverse=True)
    for earlier, later in pairwise(steps):
        if statistics.times[earlier] - statistics.times[later] <= SAME_TIME:
            raise PolicyError(
                f"denoising steps {earlier} and {later} have the same flow time "
                f"{statistics.times[later]} at {statistics.site.name!r}; what is calibrated per "
                "step needs `with clock.step(i, t):` with a t of its own for every step"
            )
    return steps, torch.tensor([statistics.times[step] for step in steps], dtype=torch.float32)


def _settled(
    scheme: ActivationScheme,
    weight: Tensor,
    statistics: SiteStatistics | None,
    transform: BlockTransform | None,
) -> ActivationScheme:
    """The scheme with what it leaves to calibration decided."""
    if scheme.clip == "search":
        share = 1.0  # means nothing beside a static scale
        if scheme.scale in ("per_token", "per_step_or_token"):
            seen = _required(statistics, "searching a clip")
            rows = [transform_rows(seen.rows(step), transform) for step in seen.steps]
            share = per_token_clip_mse(torch.cat(rows), scheme.bits)
        scheme = scheme.model_copy(update={"clip": share})
    if scheme.scale == "per_step_or_token":
        seen = _required(statistics, "choosing an activation scale")
        scheme = _better_scale(scheme, weight, seen, transform)
    return scheme


def _better_scale(
    scheme: ActivationScheme,
    weight: Tensor,
    statistics: SiteStatistics,
    transform: BlockTransform | None,
) -> ActivationScheme:
    """``per_step`` or ``per_token``, by Σ ‖(Q(x') − x') W'ᵀ‖² over the sampled rows of all steps.

    Ties go to the static scale, which costs nothing at run time.
    """
    static, dynamic = 0.0, 0.0
    for step in statistics.steps:
        rows = transform_rows(statistics.rows(step), transform)
        fixed = torch.tensor(static_scale_mse(rows, scheme.bits))
        for scale in (fixed, per_token_scale(rows, scheme.bits, scheme.share)):
            error = round_activations(rows, scale, scheme.bits) * scale - rows
            size = float((error @ weight.t()).square().sum(dtype=torch.float64))
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
    seen = _required(statistics, "a static activation scale")
    steps, times = _steps_and_times(seen)
    scales = []
    for step in steps:
        rows = transform_rows(seen.rows(step), transform)
        if scheme.scale == "per_step":
            scales.append(torch.tensor(static_scale_mse(rows, scheme.bits)))
        else:
            scales.append(channel_quantile_scale(rows, scheme.quantile, scheme.bits))
    return torch.stack(scales).to(torch.float32), times
