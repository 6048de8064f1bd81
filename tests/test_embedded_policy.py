"""What the embedded policy has to show: the default recipe's action error, plain and under stress.

The figures are the project's own targets: 4-bit weights and activations cost at most 0.01 relative
error of the action chunk in the paper's scope and 0.015 with everything quantized, also when 3 % of
the channels carry outliers of about thirty times their size.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.evaluation.openloop import draw_noises, relative_error, sample_chunks
from omega_qvla.evaluation.twin import stress_twin
from omega_qvla.policies.pi05_policy import Pi05Policy
from omega_qvla.recipe import Recipe, Scope

SOURCE = "builtin:tiny-pi05"
MAGNITUDE = 30.0


@cache
def policy() -> Pi05Policy:
    return oq.load_policy(SOURCE)


@cache
def twin() -> Pi05Policy:
    return stress_twin(policy(), MAGNITUDE, probe=held_out()[0])


@cache
def held_out() -> oq.Observations:
    return oq.Observations.load(SOURCE, split="heldout")


@cache
def chunks_of_full_precision() -> np.ndarray:
    noises = draw_noises(policy(), len(held_out()), 0)
    return sample_chunks(policy(), held_out(), noises, normalized=True)


@cache
def error(recipe: str, scope: Scope, *, stress: bool) -> float:
    """Relative error of the chunks of a recipe against full precision."""
    base = twin() if stress else policy()
    observations = oq.Observations.load(SOURCE)
    quantized = oq.quantize(base, observations, Recipe.load(recipe), scope=scope)
    noises = draw_noises(policy(), len(held_out()), 0)
    chunks = sample_chunks(quantized, held_out(), noises, normalized=True)
    return relative_error(chunks, chunks_of_full_precision())


def test_the_stress_twin_computes_the_same_function() -> None:
    noises = draw_noises(policy(), len(held_out()), 0)
    chunks = sample_chunks(twin(), held_out(), noises, normalized=True)
    assert relative_error(chunks, chunks_of_full_precision()) < 1e-9


def test_stress_in_the_papers_scope_stays_below_a_hundredth_and_a_tenth_of_the_paper() -> None:
    ours = error("omega-w4a4", "paper", stress=True)
    assert ours <= 0.01
    assert ours <= 0.1 * error("omega-paper", "paper", stress=True)


def test_plain_in_the_papers_scope_is_no_worse_than_the_paper_by_a_fifth() -> None:
    assert error("omega-w4a4", "paper", stress=False) <= 1.2 * error(
        "omega-paper", "paper", stress=False
    )


@pytest.mark.parametrize("stress", [False, True])
def test_everything_quantized_stays_within_its_bar(stress: bool) -> None:
    assert error("omega-w4a4", "all", stress=stress) <= 0.015


def test_rounding_to_nearest_breaks_under_stress() -> None:
    assert error("rtn", "paper", stress=True) > 0.1
