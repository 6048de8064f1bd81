"""Statistics of paired success rates and of motion smoothness.

Episodes are Bernoulli trials and two methods run *the same* seeds, so a comparison has three parts:

* one rate: Wilson's score interval (E. B. Wilson, JASA 22, 1927).  With z the normal quantile,
  p̂ = s/n:  (p̂ + z²/2n ± z √(p̂(1-p̂)/n + z²/4n²)) / (1 + z²/n).  It stays inside [0, 1] and is
  not of zero width at 0 or n successes;
* whether two methods differ: McNemar's exact test (Q. McNemar, Psychometrika 12, 1947).  Only
  seeds on which the methods disagree carry information; under the null hypothesis the count of
  one kind is Binomial(b + c, 1/2).  p is twice the smaller tail, at most 1;
* by how much: the adjusted Wald interval of Bonett and Price (J. Educ. Behav. Stat. 37, 2012) for
  the difference of paired proportions.  With p₁ = (b+1)/(n+2), p₂ = (c+1)/(n+2) it is
  p₁ - p₂ ± z √((p₁ + p₂ - (p₁ - p₂)²)/(n+2)).  Fagerland, Lydersen and Laake (Statistics in
  Medicine 33, 2014) recommend it as the simple choice; it keeps a width when no seed disagrees.

Smoothness is the mean squared *jerk*, the third difference of the executed actions.

An action error is a sum over observations of which a few make up half, so its interval comes from
resampling the observations: the percentile bootstrap (B. Efron, Annals of Statistics 7, 1979).  Two
methods answered the same observations, so their ratio is bootstrapped in pairs: every resample
takes the same observations of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.results.document import Interval
from omega_qvla.results.rows import PairedSuccess

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""

BOOTSTRAP_DRAWS = 4000


def wilson_interval(successes: int, episodes: int) -> Interval:
    """Wilson's 95 % interval of a success rate.

    Raises:
        ValueError: no episodes, or successes outside [0, episodes].
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes is not a rate")
    rate, z2 = successes / episodes, Z_95**2
    centre = rate + z2 / (2 * episodes)
    spread = Z_95 * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes**2))
    scale = 1 + z2 / episodes
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == episodes else (centre + spread) / scale
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the two discordant counts; 1 when there are none.

    The tail is summed in integers, so the value is exact up to one division.

    Raises:
        ValueError: a count is negative.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"discordant counts must not be negative: {only_first}, {only_second}")
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def paired_difference_interval(only_method: int, only_reference: int, episodes: int) -> Interval:
    """Bonett-Price 95 % interval of (method's rate - reference's rate) over paired episodes.

    Raises:
        ValueError: no episodes, a negative count, or more discordant pairs than episodes.
    """
    if episodes < 1 or min(only_method, only_reference) < 0:
        raise ValueError(f"not paired counts: {only_method}, {only_reference} of {episodes}")
    if only_method + only_reference > episodes:
        raise ValueError(f"{only_method} + {only_reference} discordant pairs exceed {episodes}")
    size = episodes + 2
    first, second = (only_method + 1) / size, (only_reference + 1) / size
    centre = first - second
    spread = Z_95 * math.sqrt((first + second - centre**2) / size)
    return max(-1.0, centre - spread), min(1.0, centre + spread)


def compare_paired(method: Sequence[bool], reference: Sequence[bool]) -> PairedSuccess:
    """Compare two methods from their outcomes on the same episodes, in the same order.

    Raises:
        ValueError: no pairs, or sequences of different length.
    """
    pairs = list(zip(method, reference, strict=True))
    if not pairs:
        raise ValueError("a paired comparison needs at least one episode")
    only_row = sum(ours and not theirs for ours, theirs in pairs)
    only_reference = sum(theirs and not ours for ours, theirs in pairs)
    return PairedSuccess(
        episodes=len(pairs),
        only_row=only_row,
        only_reference=only_reference,
        difference=(only_row - only_reference) / len(pairs),
        ci95=paired_difference_interval(only_row, only_reference, len(pairs)),
        mcnemar_p=mcnemar_exact(only_row, only_reference),
    )


def mean_squared_jerk(actions: npt.ArrayLike) -> float | None:
    """Mean over time and dimensions of the squared third difference of actions [steps, dim].

    Units are those of the actions, per control step cubed, squared.  None with fewer than four
    actions, where no third difference exists.
    """
    sequence = np.asarray(actions, dtype=np.float64)
    if sequence.ndim != 2:
        raise ValueError(f"actions must be [steps, dim], got shape {sequence.shape}")
    if sequence.shape[0] < 4 or sequence.shape[1] == 0:
        return None
    return float(np.mean(np.diff(sequence, n=3, axis=0) ** 2))


def relative_smoothness(
    jerk: Sequence[float | None], reference: Sequence[float | None]
) -> float | None:
    """Mean jerk of a method over that of the reference, on paired episodes; 1 is equally smooth.

    Pairs in which either has no jerk are left out.  None if no pair is left or the reference does
    not move.
    """
    pairs = [
        (ours, theirs)
        for ours, theirs in zip(jerk, reference, strict=True)
        if ours is not None and theirs is not None
    ]
    total = math.fsum(theirs for _, theirs in pairs)
    return math.fsum(ours for ours, _ in pairs) / total if total > 0 else None


def bootstrap_total(shares: npt.ArrayLike) -> Interval:
    """Bootstrap 95 % interval of a sum over observations, [n]."""
    values = np.asarray(shares, dtype=np.float64)
    return _percentiles(values[_resamples(len(values))].sum(axis=1))


def bootstrap_ratio(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> tuple[float, Interval]:
    """Sum of ``ours`` over that of ``theirs``, and its 95 % interval by paired bootstrap.

    Args:
        ours, theirs: [n], of the same observations in the same order.

    Raises:
        ValueError: different lengths, or a total of ``theirs`` that is zero.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    if first.shape != second.shape or not second.sum() > 0:
        raise ValueError("a ratio needs pairs, and a second total above zero")
    return _bootstrap_quotient(np.sum, first, second)


def bootstrap_median_ratio(
    ours: npt.ArrayLike, theirs: npt.ArrayLike
) -> tuple[float, Interval] | None:
    """As ``bootstrap_ratio``, of the medians: what is typical, whatever a few outliers do.

    None where the median of ``theirs`` is zero.

    Raises:
        ValueError: different lengths.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    if first.shape != second.shape:
        raise ValueError("a ratio needs pairs")
    return None if not np.median(second) > 0 else _bootstrap_quotient(np.median, first, second)


def _bootstrap_quotient(
    of: Callable[..., Any], first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
) -> tuple[float, Interval]:
    drawn = _resamples(len(first))
    above, below = (of(values[drawn], axis=1) for values in (first, second))
    ratios = above[below > 0] / below[below > 0]
    return float(of(first) / of(second)), _percentiles(ratios)


def _resamples(count: int) -> npt.NDArray[np.int64]:
    """Indices [draws, count], the same whenever they are drawn."""
    return np.random.default_rng(0).integers(count, size=(BOOTSTRAP_DRAWS, count))


def _percentiles(values: npt.NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
