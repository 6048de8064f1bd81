"""What to expect of inputs that calibration did not see.

A transform divides by sizes that calibration measured. They are estimates: a channel of the head
that carries the instruction is constant where calibration showed one instruction, and a channel
behind an activation function is silent until something makes it fire. What is divided by such a
size is amplified without bound as soon as it moves.

**What a later deviation costs.** Let m_j² be the mean square of channel j as it will be, w_j the
size of its weight column, c_j its smoothing. Four bits share one scale over a token, so rounding
adds noise in proportion to Σ m_j²/c_j², and the weight carries it on, and its own, in proportion
to Σ c_j² w_j²:

    cost(c) ∝ (Σ_j m_j² / c_j²) · (Σ_j c_j² w_j²)     at best  (Σ_j m_j w_j)².

It is linear in m_j²: what minimises its expectation over all that m_j² may be is its *mean*,
whatever the distribution. The mean of a scaled inverse-χ² posterior after n independent samples of
mean square s_j², with a prior worth one sample around d_j², is

    E[m_j²] = (n s_j² + d_j²) / (n + 1).

**What the prior is around.** What counts is a channel's share m_j w_j of the output, not its size:
whoever multiplies a channel by f and its column by 1/f has changed nothing. So the prior says that
a channel may come to contribute as much as the channels of its site do on average,

    d_j w_j = mean_k(s_k w_k).

**How many samples.** All observations of a calibration have in common what it was recorded with:
the task, the light, the sentence. Rows, tokens and observations are no independent samples of
those, and nothing in them tells how many there were. For the smoothing, which could amplify, they
count as n = 1; then v_j = s_j² + d_j² (a common factor is of no consequence), and c_j is never
below what an average channel would get. For GPTQ, whose loss from an error in a direction it has
not seen is bounded by the rounding itself, n is the number of observations: its Hessian gets d_j²
/ (n + 1) on the diagonal.

The estimate of a variance by shrinkage is that of James and Stein; smoothing as such SmoothQuant's
(arXiv 2211.10438).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_WEIGHT = 2.0**-16
"""Columns count as no smaller than this share of the largest: smoothing moves no more than that."""


def expected_deviation(input_size: Tensor, weight_size: Tensor) -> Tensor:
    """d: how far each channel may come to move, by the prior alone.

    Args:
        input_size: [K] sizes of the channels in calibration, not negative.
        weight_size: [K] sizes of the weight's columns, of the same kind.

    Returns:
        [K] float64, mean_k(s_k w_k) / w_j; zeros where input or weight is zero throughout.
    """
    inputs, weights = input_size.to(torch.float64), weight_size.to(torch.float64)
    largest = weights.max() if weights.numel() else weights.sum()
    if not bool(largest > 0):
        return torch.zeros_like(inputs)
    return (inputs * weights).mean() / weights.clamp_min(SMALLEST_WEIGHT * float(largest))


def expected_size(input_size: Tensor, deviation: Tensor) -> Tensor:
    """√(s² + d²), [K] float64: the sizes that a transform may divide by."""
    return torch.hypot(input_size.to(torch.float64), deviation)
