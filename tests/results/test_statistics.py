"""Oracles: published worked examples, hand-computed values, and direct definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from omega_qvla.results.statistics import (
    Z_95,
    bootstrap_median_ratio,
    bootstrap_ratio,
    bootstrap_total,
    compare_paired,
    mcnemar_exact,
    mean_squared_jerk,
    paired_difference_interval,
    relative_smoothness,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3; printed to 4 digits
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_examples(successes, episodes, low, high):
    found = wilson_interval(successes, episodes)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation():
    """The interval is where |p̂ - p| = z √(p(1-p)/n); checked by substitution."""
    for successes, episodes in [(3, 10), (380, 400), (1, 2), (50, 100)]:
        rate = successes / episodes
        for bound in wilson_interval(successes, episodes):
            standard_error = (bound * (1 - bound) / episodes) ** 0.5
            assert abs(rate - bound) / standard_error == pytest.approx(Z_95, rel=1e-9)


def test_wilson_is_symmetric_and_reaches_the_ends_exactly():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    low, high = wilson_interval(2, 9)
    assert wilson_interval(7, 9) == pytest.approx((1 - high, 1 - low), abs=1e-15)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_impossible_counts(successes, episodes):
    with pytest.raises(ValueError, match="not a rate"):
        wilson_interval(successes, episodes)


def test_mcnemar_equals_enumeration_of_all_outcomes():
    """Every assignment of the discordant pairs is equally likely; count those as extreme."""
    for first, second in product(range(6), repeat=2):
        total = first + second
        outcomes = [sum(bits) for bits in product((0, 1), repeat=total)]
        extreme = sum(abs(2 * k - total) >= abs(first - second) for k in outcomes)
        assert mcnemar_exact(first, second) == float(Fraction(extreme, 2**total))


def test_mcnemar_known_values():
    # Fagerland, Lydersen & Laake 2014, airway hyper-responsiveness: 1 against 7 gives P = 0.0703
    assert mcnemar_exact(1, 7) == 18 / 256
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(4, 4) == 1.0
    assert mcnemar_exact(0, 2000) < 1e-300
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 3)


def test_paired_interval_by_hand():
    """1 and 7 discordant of 21: p = 2/23, 8/23, variance (10/23 - (6/23)²)/23 = 194/23³."""
    low, high = paired_difference_interval(1, 7, 21)
    spread = 1.959963984540054 * (194 / 23**3) ** 0.5
    assert (low, high) == pytest.approx((-6 / 23 - spread, -6 / 23 + spread), abs=1e-12)


def test_paired_interval_keeps_a_width_without_disagreement_and_stays_in_range():
    low, high = paired_difference_interval(0, 0, 400)
    assert low == -high
    assert 0.005 < high < 0.01
    assert paired_difference_interval(2, 0, 2)[1] == 1.0


def test_paired_interval_covers_the_truth_about_95_percent_of_the_time():
    """4000 draws: three standard errors are 0.0103; 0.01 more as the method is approximate."""
    generator = np.random.default_rng(7)
    draws = generator.multinomial(200, (0.06, 0.12, 0.82), size=4000)
    covered = [low <= -0.06 <= high for low, high in (_interval(draw) for draw in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.0103 + 0.01)


def _interval(draw):
    return paired_difference_interval(int(draw[0]), int(draw[1]), 200)


@pytest.mark.parametrize("counts", [(1, 1, 0), (-1, 0, 5), (3, 3, 5)])
def test_paired_interval_refuses_impossible_counts(counts):
    with pytest.raises(ValueError):
        paired_difference_interval(*counts)


def test_comparison_counts_who_won_alone():
    compared = compare_paired([True, True, False, False, True], [True, False, False, True, False])
    assert (compared.only_row, compared.only_reference, compared.episodes) == (2, 1, 5)
    assert compared.difference == pytest.approx(0.2)
    assert compared.mcnemar_p == 1.0
    with pytest.raises(ValueError):
        compare_paired([True], [True, False])
    with pytest.raises(ValueError, match="at least one"):
        compare_paired([], [])


def test_jerk_of_a_cubic_is_its_third_derivative():
    """Third differences of t³ are 6 everywhere, of a parabola 0."""
    t = np.arange(12.0)
    assert mean_squared_jerk(t[:, None] ** 3) == pytest.approx(36.0)
    assert mean_squared_jerk(np.stack((t**2, t**3), axis=1)) == pytest.approx(18.0)
    assert mean_squared_jerk([[1.0], [0.0], [0.0], [0.0]]) == 1.0


def test_jerk_of_too_short_a_motion_is_undefined():
    assert mean_squared_jerk(np.zeros((3, 2))) is None
    with pytest.raises(ValueError, match="steps, dim"):
        mean_squared_jerk(np.zeros(5))


def test_relative_smoothness_is_a_ratio_of_means_over_complete_pairs():
    assert relative_smoothness([2.0, None, 4.0], [1.0, 50.0, 2.0]) == 2.0
    assert relative_smoothness([2.0, 9.0], [1.0, None]) == 2.0
    assert relative_smoothness([2.0], [0.0]) is None
    assert relative_smoothness([None], [None]) is None


def test_bootstrap_intervals_of_totals_and_ratios():
    values = np.random.default_rng(0).exponential(size=200)
    low, high = bootstrap_total(values)
    deviation = values.std() * math.sqrt(len(values))  # of a sum of 200 draws
    assert low == pytest.approx(values.sum() - 1.96 * deviation, rel=0.03)
    assert high == pytest.approx(values.sum() + 1.96 * deviation, rel=0.03)
    ratio, (below, above) = bootstrap_ratio(3 * values, values)
    assert ratio == pytest.approx(3) and below == pytest.approx(3) and above == pytest.approx(3)
    shuffled = np.random.default_rng(1).permutation(values)
    ratio, (below, above) = bootstrap_ratio(shuffled, values)
    assert ratio == pytest.approx(1) and below < 0.9 and above > 1.1
    with pytest.raises(ValueError, match="pairs"):
        bootstrap_ratio(values[:3], values)
    with pytest.raises(ValueError, match="above zero"):
        bootstrap_ratio(values[:3], [0, 0, 0])


def test_the_ratio_of_medians_does_not_see_outliers():
    values = np.random.default_rng(0).exponential(size=201)
    spoilt = np.where(values > np.quantile(values, 0.9), 1e6, 2 * values)
    found = bootstrap_median_ratio(spoilt, values)
    assert found is not None
    ratio, (below, above) = found
    assert ratio == pytest.approx(2) and below == pytest.approx(2) and above == pytest.approx(2)
    shuffled = bootstrap_median_ratio(np.random.default_rng(1).permutation(values), values)
    assert shuffled is not None
    assert shuffled[0] == pytest.approx(1) and shuffled[1][0] < 0.9 and shuffled[1][1] > 1.1
    assert bootstrap_median_ratio([1.0, 2.0, 3.0], [0.0, 0.0, 3.0]) is None
    with pytest.raises(ValueError, match="pairs"):
        bootstrap_median_ratio(values[:3], values)
