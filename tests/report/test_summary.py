"""Which recipe a report is about, by its rule."""

from __future__ import annotations

import pytest

from omega_qvla.errors import ResultError
from omega_qvla.report.sources import Sources
from omega_qvla.report.summary import sentence_of, summarise
from omega_qvla.results.rows import PairedSuccess, Row


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
BEST = [row("best", "plain", 0.001), row("best", "stress:30", 0.001)]
ELSEWHERE = [one.model_copy(update={"policy": "other"}) for one in STEADY]


@pytest.mark.parametrize(
    ("asked", "default", "rows", "headline"),
    [
        ("steady", "best", [*BEST, *STEADY], "steady on robot"),
        (None, "steady", [*BEST, *STEADY], "steady on robot"),
        (None, "steady", [*BEST, *STEADY, *ELSEWHERE], "steady on robot"),
        (None, "absent", STEADY, "steady on robot"),
        (None, "absent", [*BEST, *STEADY], "2 recipes on robot"),
        (None, "steady", list(reversed(STEADY)), "steady on robot"),
    ],
)
def test_the_headline_is_the_recipe_asked_for_or_the_default_and_never_a_rival(
    asked: str | None, default: str, rows: list[Row], headline: str
) -> None:
    found = summarise(Sources(results=[FULL, *rows]), asked, default)
    assert found.headline.startswith(headline)
    assert "best" not in found.headline and len(found.facts) <= 3
    if found.facts:
        assert "plain" in found.facts[0][1]


def test_a_recipe_without_rows_is_refused_with_those_there_are() -> None:
    with pytest.raises(ResultError, match=r"'stedy'; did you mean 'steady'\?; they have best, ste"):
        summarise(Sources(results=[FULL, *BEST, *STEADY]), "stedy")


def test_three_numbers_and_a_sentence() -> None:
    paired = PairedSuccess(
        episodes=100,
        only_row=1,
        only_reference=9,
        difference=-0.08,
        ci95=(-0.14, -0.02),
        mcnemar_p=0.021,
    )
    worse = STEADY[0].model_copy(update={"paired_vs_reference": paired})
    found = summarise(Sources(results=[FULL, worse, row("rtn", "plain", 0.05)]), "steady")
    assert [figure.replace("\u00a0", " ") for figure, _ in found.facts] == [
        "90.0 %",
        "0.012",
        "100 B",
    ]
    assert found.sentence.count(".") - found.sentence.count("0.") <= 4
    assert "−8.0 points (−14.0 to −2.0), significantly worse (McNemar's exact p = 0.021)" in (
        found.sentence
    )
    unpaired = summarise(Sources(results=[FULL, STEADY[0], row("rtn", "plain", 0.05)]), "steady")
    assert unpaired.sentence == "Round to nearest (rtn) has an action error of 0.05."


def test_few_episodes_are_a_count_and_called_a_smoke_test() -> None:
    few = STEADY[0].model_copy(
        update={"success": {"open": (4, 4)}, "success_mean": 1.0, "episodes": 4, "smoke": True}
    )
    found = summarise(Sources(results=[FULL, few]), "steady")
    assert found.headline.startswith("steady on robot: 4 of 4 solved, 90.0")
    assert found.facts[0][0] == "4 of 4" and "a smoke test" in found.facts[0][1]


def test_a_comparison_ends_with_a_line_about_the_default() -> None:
    line = sentence_of([FULL, *BEST, *STEADY], "steady")
    assert line.startswith("steady on robot: 90.0")
    assert sentence_of([FULL, *BEST, *STEADY], "x") == "2 recipes on robot; none of them is x"
