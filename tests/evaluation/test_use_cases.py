"""The public functions do what the commands do, from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import omega_qvla as oq
from omega_qvla.errors import OutputError, PolicyError, RecipeError, UsageError
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Comparison

POLICY = "builtin:tiny-pi05"
ENVIRONMENT = '''
import gymnasium
import numpy as np
from gymnasium import spaces

class Still(gymnasium.Env):
    """Episodes of even seeds are solved by their third step, those of odd ones never."""

    def __init__(self, task):
        self.task = task
        self.action_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.solvable = 0, seed % 2 == 0
        return self.see(), {}

    def step(self, action):
        self.count += 1
        solved = self.solvable and self.count == 3
        return self.see(), 0.0, solved, self.count == 6, {"is_success": solved}

    def see(self):
        picture = np.full((84, 84, 3), self.count, np.uint8)
        images = {"base": picture, "wrist": picture}
        return {"images": images, "state": np.zeros(4, np.float32), "prompt": "open the door"}
'''


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


def test_a_policy_in_memory_runs_in_an_environment_and_nowhere_else(
    few: tuple[oq.Observations, oq.Observations],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gymnasium", reason="the simulator is an optional extra")
    (tmp_path / "mine.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    quantized = oq.quantize(oq.load_policy(POLICY), few[0], "rtn")
    told: list[tuple[str, int, int]] = []
    found = oq.evaluate(
        quantized,
        "mine:Still",
        tasks=["open"],
        episodes=2,
        progress=lambda *report: told.append(report),
    ).row
    assert (found.recipe, found.success, found.seeds) == ("rtn", {"open": (1, 2)}, [0, 1])
    assert (found.environment, found.execute, found.action_error) == ("mine:Still", 5, None)
    assert found.resident_bytes == quantized.resident_bytes()
    assert told[-1][1:] == (2, 2)
    with pytest.raises(UsageError, match="in this process"):
        oq.evaluate(quantized, "mine:Still", tasks=["open"], resources=oq.Resources(processes=2))
    with pytest.raises(UsageError, match="cannot be kept"):
        oq.evaluate(quantized, "mine:Still", tasks=["open"], out=tmp_path / "kept")
    with pytest.raises(UsageError, match="needs `tasks`"):
        oq.evaluate(quantized, "mine:Still")
