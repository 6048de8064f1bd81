"""Weights for inputs as they will be rounded.

GPTQ asks for the integers whose product with the *exact* inputs comes closest to the output.  In
four bits the inputs are rounded as well, x̂ = x + n, and the rounding noise n is most of a layer's
error.  What the weights V that stand in for W do with it can be put into the same question:

    J(V) = E‖(W - V) x‖² + ρ E‖V n‖².

With H = E[xᵀx] and noises that are not correlated with the inputs nor between channels, which a
rotation in front sees to, E[nᵀn] = N is diagonal and J is a quadratic form around one minimum,

    J(V) = tr((V - W*)(H + ρN)(V - W*)ᵀ) + const,     W* = W H (H + ρN)⁻¹ = W - ρ W N (H + ρN)⁻¹,

the Wiener filter of the noise: directions of x that are weaker than the noise are not multiplied at
full strength, because what comes in along them is mostly noise.  So nothing about GPTQ changes but
its two inputs: W* in place of W, and H + ρN in place of H.  (GPTAQ, arXiv 2504.02692, and Qronos,
arXiv 2505.11695, move GPTQ's target in the same way for the errors of earlier layers.)

**Why ρ < 1.**  ρ = 1 gives the least error of a single layer's output.  But the two terms do not go
on alike.  (W - V) x is the same error wherever x is alike: in every token, in every denoising step.
V n is another one each time, and whatever averages over tokens or steps behind the layer averages
it away, so that by the action it counts for less.

N comes from the sampled rows, rounded with the scales that the site will use; no second pass over
the calibration data, no second matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.quantization.weights import FLOAT64_WIDTH

_RIDGE = 1e-6
"""Of the mean diagonal, so that a direction without signal and noise can be factored."""


def noise_share(rows: Tensor, rounded: Tensor) -> Tensor:
    """What rounding adds to each channel, as a share of the channel's own energy.

    Args:
        rows: [R, K] sampled inputs.
        rounded: [R, K] the same as the integer product will see them, integers times scale.

    Returns:
        [K] float64, E[n²] / E[x²]; 0 for a channel of zeros.
    """
    exact = rows.to(torch.float64)
    energy = exact.square().sum(dim=0)
    noise = (rounded.to(torch.float64) - exact).square().sum(dim=0)
    return torch.where(energy > 0, noise / energy, torch.zeros_like(noise))


def fit_to_rounded(
    weight: Tensor, hessian: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, str | None]:
    """W* and H + ρN.

    Args:
        weight: [N, K] float32.
        hessian: [K, K] second moment of the exact inputs; overwritten by H + ρN.
        noise: [K], ρ times ``noise_share``.

    Returns:
        [N, K] float32, [K, K], and a note if there is no factor: then the weight is as it was.
    """
    dtype = torch.float64 if hessian.shape[0] <= FLOAT64_WIDTH else torch.float32
    added = noise.to(hessian.dtype) * hessian.diagonal()
    hessian.diagonal().add_(added)
    factor = hessian.to(dtype, copy=True)
    diagonal = factor.diagonal()
    silent = diagonal == 0
    diagonal.add_(_RIDGE * diagonal.mean()).add_(silent.to(dtype))
    factor, info = torch.linalg.cholesky_ex(factor)
    if int(info) != 0:
        return weight, hessian, "not fitted to rounded inputs: the Hessian has no factor"
    lost = (weight.to(dtype) * added.to(dtype)).t()
    fitted = weight - torch.cholesky_solve(lost, factor).t().to(weight.dtype)
    return fitted, hessian, None
