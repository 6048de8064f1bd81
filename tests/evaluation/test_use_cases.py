"""The public functions do what the commands do, from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import omega_qvla as oq
from omega_qvla.errors import OutputError, PolicyError, RecipeError
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Comparison

POLICY = "builtin:tiny-pi05"


@pytest.fixture(scope="module")
def few() -> tuple[oq.Observations, oq.Observations]:
    """Enough to quantize with, and to see an error of."""
    split = (oq.Observations.load(POLICY, split=name) for name in ("calibration", "heldout"))
    calibration, held = (observations.spread(2) for observations in split)
    return calibration, held


def test_a_comparison_is_written_returned_and_continued(
    few: tuple[oq.Observations, oq.Observations], tmp_path: Path
) -> None:
    told: list[str] = []

    def compare(**options: bool) -> Comparison:
        return oq.compare(
            POLICY,
            ["rtn"],
            observations=few,
            episodes=0,
            noises=1,
            out=tmp_path,
            say=told.append,
            **options,
        )

    found = compare()
    assert [row.recipe for row in found.rows] == ["fp32", "rtn"]
    assert found.rows == load_comparison(tmp_path / "results.json").rows
    error = found.rows[1].action_error
    assert error is not None and error > 0
    assert json.loads((tmp_path / "made-by.json").read_text())["command"] == "compare"
    with pytest.raises(OutputError, match="fp32 \\(plain\\), rtn \\(plain\\)"):
        compare()
    again = compare(resume=True)
    assert [row.action_errors for row in again.rows] == [row.action_errors for row in found.rows]


def test_a_comparison_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no-such-recipe"):
        oq.compare(POLICY, ["no-such-recipe"], episodes=0, out=tmp_path / "out")
    with pytest.raises(PolicyError, match="brings no calibration data"):
        oq.compare("random:tiny-pi05", ["rtn"], episodes=0, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_is_of_its_own_policies(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="huge: benchmark v1-quick has tiny-pi05, tiny-gr00t"):
        oq.benchmark(["huge"], quick=True, out=tmp_path)
