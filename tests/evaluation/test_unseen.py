"""The cell of what calibration did not see: its calibrations, its shares, and a small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError
from omega_qvla.evaluation import unseen
from omega_qvla.evaluation.unseen import (
    BLACK,
    CONDITIONS,
    ONE,
    SEEN,
    UNSEEN,
    Unseen,
    calibrations,
    condition_shares,
    measure_unseen,
)
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.recipe import Recipe
from omega_qvla.report.benchmark_table import unseen_table
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Comparison

TASKS = ("a", "b", "c", "d")


def of_tasks(few: Observations, each: int = 3) -> list[dict[str, Any]]:
    return [{**few[i % len(few)], "task": task} for task in TASKS for i in range(each)]


def test_each_pair_of_tasks_one_observation_and_a_black_image(few: Observations) -> None:
    found = calibrations(of_tasks(few), 4)
    pairs = found[:-2]
    assert len({pair.tasks for pair in pairs}) == 6
    for pair in pairs:
        told = [observation["task"] for observation in pair.observations]
        assert sorted(told) == sorted([*pair.tasks] * 2)
    one, black = found[-2:]
    assert [one.name, black.name] == [ONE, BLACK]
    assert len(one.observations) == len(black.observations) == 1
    assert all(not image.any() for image in black.observations[0]["images"].values())
    assert all(image.any() for image in one.observations[0]["images"].values())
    assert np.array_equal(one.observations[0]["state"], black.observations[0]["state"])


def test_observations_without_tasks_are_refused(few: Observations) -> None:
    with pytest.raises(ObservationError, match="observation 0 does not say"):
        calibrations(list(few), 4)
    with pytest.raises(ObservationError, match="three tasks"):
        calibrations([{**few[0], "task": task} for task in "ab"], 4)


def test_seen_and_unseen_are_over_the_same_observations(few: Observations) -> None:
    """A pair adds 1 to each observation of its tasks and 10 to each other: so do the averages."""
    given = calibrations(of_tasks(few), 4)
    tasks = ["a", "b", "c", "d", "a"]
    shares = {
        one.name: np.array([1.0 if task in one.tasks else 10.0 for task in tasks]) for one in given
    }
    found = condition_shares(shares, given, tasks)
    assert tuple(found) == CONDITIONS
    assert np.array_equal(found[SEEN], np.ones(5))
    assert np.array_equal(found[UNSEEN], np.full(5, 10.0))


def test_a_run_is_continued_and_gives_rows_of_a_comparison(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three quantizations; what was measured is not quantized again.

    All calibrations are answered with one policy: what is counted is who asks for how many.
    """
    observations = Observations(of_tasks(few))
    asked: list[str] = []
    quantized = oq.quantize(small_policy, observations, "rtn")

    def counted(_policy: Any, _calibration: Any, recipe: Recipe, **_: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(recipe.name)
        return quantized

    def run(name: str, *, resume: bool) -> Comparison:
        return measure_unseen(
            small_policy,
            "small",
            [Recipe.load("rtn"), Recipe.load(name)],
            observations,
            observations,
            definition=replace(Unseen(), observations=2, heldout=4, noises=1),
            weights="w",
            partial=tmp_path / "partial.json",
            resume=resume,
            progress=lambda _label, _done, _total: None,
            machine="m",
            command="c",
        )

    monkeypatch.setattr(unseen, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        run("quarot", resume=False)
    assert asked == ["rtn", "quarot", "quarot"]  # no calibration changes rtn
    asked.clear()
    monkeypatch.setattr(unseen, "quantize", lambda *_, **__: asked.append("again") or quantized)
    document = run("quarot", resume=True)
    assert len(asked) == 6  # of nine
    again = run("quarot", resume=False)
    assert document == again and not (tmp_path / "partial.json").exists()
    path = tmp_path / "small-unseen.json"
    path.write_text(json.dumps(document.to_json()))
    rows = load_comparison(path).rows
    assert rows == document.rows
    assert [(row.recipe, row.condition) for row in rows] == [
        (name, condition) for condition in CONDITIONS for name in ("rtn", "quarot")
    ]
    rtn = [row for row in rows if row.recipe == "rtn"]
    assert len({row.action_error for row in rtn}) == 1
    assert rtn[1].unseen_over_seen is not None
    assert rtn[1].unseen_over_seen.ratio == pytest.approx(1.0)
    assert unseen_table(rows).header == ("recipe", *CONDITIONS, "unseen over seen")
