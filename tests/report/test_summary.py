"""Which recipe a report is about, by its rule."""

from __future__ import annotations

import pytest

from omega_qvla.report.sources import Sources
from omega_qvla.report.summary import summarise
from omega_qvla.results.rows import Row


def row(recipe: str, condition: str, error: float, bits: float | None = 4.2) -> Row:
    return Row(
        policy="robot",
        recipe=recipe,
        condition=condition,
        realizable=True,
        success={"open": (90, 100)},
        success_mean=0.9,
        success_ci95=(0.82, 0.95),
        action_error=error,
        noise_floor=0.1,
        action_error_ci95=None,
        action_errors=None,
        error_vs_default=None,
        noises=None,
        smoothness=None,
        drift=None,
        paired_vs_reference=None,
        checkpoint_bytes=100,
        resident_bytes=None,
        ms_per_chunk=None,
        seeds=[],
        episodes=100,
        smoke=False,
        bits_per_weight=bits,
    )


FULL = row("fp32", "plain", 0.0, 16.0).model_copy(update={"checkpoint_bytes": 400})
STEADY = [row("steady", "plain", 0.012), row("steady", "stress:30", 0.013)]
BRITTLE = [row("brittle", "plain", 0.010), row("brittle", "stress:30", 0.9)]
WIDE = [row("wide", "plain", 0.001, 9.0), row("wide", "stress:30", 0.001, 9.0)]


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([*BRITTLE, *STEADY, *WIDE], "steady"),
        ([*BRITTLE, *WIDE], "brittle"),
        (WIDE, "wide"),
        ([BRITTLE[0], STEADY[0]], "brittle"),
        ([r.model_copy(update={"bits_per_weight": None}) for r in [*STEADY, *WIDE]], "wide"),
        (
            [
                *STEADY,
                *(r.model_copy(update={"policy": "other", "action_error": 0.0}) for r in STEADY),
            ],
            "steady on robot",
        ),
        ([r.model_copy(update={"realizable": False}) for r in BRITTLE] + STEADY, "steady"),
    ],
)
def test_the_words_are_about_the_four_bit_recipe_whose_worst_condition_is_best(rows, name) -> None:
    assert summarise(Sources(results=[FULL, *rows])).headline.startswith(f"{name}")


def test_a_twin_without_its_own_full_precision_is_compared_with_the_plain_one() -> None:
    words = " ".join(summarise(Sources(results=[FULL, *STEADY])).sentences)
    assert words.count("full precision 90 of 100") == 2
