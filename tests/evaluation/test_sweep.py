from __future__ import annotations

import json

import numpy as np
import pytest

from omega_qvla.errors import RecipeError, ResourceError
from omega_qvla.evaluation.execution.blueprint import Built, Footprint
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, SweepRow
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.results.statistics import wilson_interval
from omega_qvla.results.writing import write_json

CONTRACT = {
    "policy",
    "recipe",
    "condition",
    "realizable",
    "success",
    "success_mean",
    "success_ci95",
    "action_error",
    "noise_floor",
    "smoothness",
    "checkpoint_bytes",
    "resident_bytes",
    "ms_per_chunk",
    "seeds",
}


def built(make, *given, **named):
    """How a row comes by a policy that only this process has."""
    return lambda _report: Built(make(*given, **named), Footprint())


@pytest.fixture
def rows(point_policy):
    return [
        SweepRow(
            "point",
            "halved",
            lambda _: Built(point_policy(gain=0.1), Footprint(100, 100)),
            realizable=False,
            scope="paper",
        ),
        SweepRow("point", "fp32", built(point_policy)),
        SweepRow("point", "halved", built(point_policy, gain=0.2), condition="stress:30"),
        SweepRow("point", "twin", built(point_policy), condition="stress:30"),
    ]


@pytest.fixture
def open_loop():
    generator = np.random.default_rng(5)
    return OpenLoop([{"state": generator.uniform(-2, 2, 3)} for _ in range(6)], seed=1)


def test_rows_follow_the_contract_and_are_paired_with_full_precision(rows, environment, open_loop):
    lines = []
    with SimulatorPool(2, environment) as pool:
        closed_loop = ClosedLoop(pool, ["near", "far"], range(6))
        document = run_sweep(
            rows,
            closed_loop=closed_loop,
            open_loop=open_loop,
            progress=lambda label, done, total: lines.append((label, done, total)),
        ).to_json()
    json.dumps(document, allow_nan=False)
    assert (document["schema"], document["policy"]) == (1, "point")
    halved, reference, _, twin = document["rows"]
    assert [row["recipe"] for row in document["rows"]] == ["halved", "fp32", "halved", "twin"]
    assert all(set(row) >= CONTRACT for row in document["rows"])
    assert lines[0] == ("point, fp32, plain", 0, 12)
    assert lines[-1] == ("point, twin, stress:30", 12, 12)

    won = sum(successes for successes, _ in reference["success"].values())
    assert [count for _, count in reference["success"].values()] == [6, 6]
    assert reference["success_mean"] == won / 12 > 0.5
    assert reference["success_ci95"] == list(wilson_interval(won, 12))
    assert reference["seeds"] == list(range(6))
    assert reference["smoke"] is True
    assert (reference["smoothness"], reference["action_error"]) == (1.0, 0.0)
    assert reference["paired_vs_reference"] is None

    paired = halved["paired_vs_reference"]
    lost = sum(successes for successes, _ in halved["success"].values()) - won
    assert lost < 0
    assert paired["difference"] == pytest.approx(lost / 12)
    assert paired["only_row"] - paired["only_reference"] == lost
    assert 0 < paired["mcnemar_p"] < 1
    assert halved["noise_floor"] == reference["noise_floor"] > 0
    assert halved["action_error"] > 0.1
    assert (halved["checkpoint_bytes"], halved["resident_bytes"]) == (100, 100)
    assert (halved["scope"], halved["realizable"]) == ("paper", False)

    # the same function under another label: identical chunks, episodes and motion
    assert (twin["action_error"], twin["smoothness"]) == (0.0, 1.0)
    assert twin["paired_vs_reference"]["mcnemar_p"] == 1.0


def test_without_a_simulator_the_open_loop_half_still_runs(rows, open_loop):
    document = run_sweep(rows, closed_loop=None, open_loop=open_loop).to_json()
    row = document["rows"][0]
    assert row["action_error"] > 0.1
    assert (row["success"], row["success_mean"], row["success_ci95"]) == ({}, None, None)
    assert (row["ms_per_chunk"], row["smoothness"], row["paired_vs_reference"]) == (None,) * 3
    assert row["seeds"] == []
    json.dumps(document, allow_nan=False)


def test_rows_build_one_policy_each_and_full_precision_first(point_policy, open_loop):
    order = []

    def build(name):
        return built(lambda: order.append(name) or point_policy())

    rows = [SweepRow("p", "a", build("a")), SweepRow("p", "bf16", build("bf16"))]
    run_sweep(rows, closed_loop=None, open_loop=open_loop)
    assert order == ["bf16", "a"]


def test_an_interrupted_sweep_continues(rows, environment, open_loop, tmp_path):
    def stop_late(label, done, total):
        if "twin" in label and done == 3:
            raise KeyboardInterrupt

    episodes = []
    with SimulatorPool(2, environment) as pool:
        closed_loop = ClosedLoop(pool, ["near"], range(5), journals=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(rows, closed_loop=closed_loop, open_loop=open_loop, progress=stop_late)
        resumed = run_sweep(
            rows,
            closed_loop=closed_loop,
            open_loop=open_loop,
            progress=lambda label, done, total: episodes.append((label, done)),
        )
        fresh = run_sweep(
            rows, closed_loop=ClosedLoop(pool, ["near"], range(5)), open_loop=open_loop
        )
    assert ("point, fp32, plain", 0) not in episodes
    assert ("point, twin, stress:30", 3) in episodes
    untimed = {"ms_per_chunk": 0}
    for ours, theirs in zip(resumed.rows, fresh.rows, strict=True):
        assert ours.model_copy(update=untimed) == theirs.model_copy(update=untimed)


def test_a_comparison_that_cannot_be_made_is_refused(point_policy, open_loop):
    lone = SweepRow("point", "rtn", built(point_policy))
    with pytest.raises(RecipeError, match="full-precision row"):
        run_sweep([lone], closed_loop=None, open_loop=open_loop)
    with pytest.raises(RecipeError, match="at least one"):
        run_sweep([], closed_loop=None, open_loop=open_loop)
    reference = SweepRow("point", "fp32", built(point_policy))
    with pytest.raises(RecipeError, match="given twice: point, rtn, plain"):
        run_sweep([reference, lone, lone], closed_loop=None, open_loop=open_loop)
    other = SweepRow("line", "rtn", built(point_policy))
    with pytest.raises(RecipeError, match="line, rtn, plain"):
        run_sweep([reference, other], closed_loop=None, open_loop=open_loop)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out" / "run.json"
    write_json({"rows": [1]}, target)
    with pytest.raises(ValueError):
        write_json({"rows": [float("nan")]}, target)
    assert json.loads(target.read_text()) == {"rows": [1]}
    assert [path.name for path in target.parent.iterdir()] == ["run.json"]
    with pytest.raises(ResourceError, match="cannot write"):
        write_json({}, target / "below-a-file.json")


def test_errors_have_an_interval_and_are_paired_with_the_omega_recipe(
    environment, open_loop, point_policy
):
    """A row twice as wrong as the default is, observation by observation, four times its error."""
    plain = point_policy(gain=1.0)
    double = [
        SweepRow("point", "fp32", built(lambda: plain)),
        SweepRow("point", DEFAULT_RECIPE, built(_Shifted, plain, 0.1)),
        SweepRow("point", "other", built(_Shifted, plain, 0.2)),
    ]
    with SimulatorPool(1, environment) as pool:
        closed = ClosedLoop(pool, ["near"], range(2))
        document = run_sweep(double, closed_loop=closed, open_loop=open_loop).to_json()
        full, ours, other = document["rows"]
    assert sum(ours["action_errors"]) == pytest.approx(ours["action_error"], rel=1e-3)
    low, high = ours["action_error_ci95"]
    assert low <= ours["action_error"] <= high
    assert ours["error_vs_default"] is None
    assert other["error_vs_default"]["ratio"] == pytest.approx(4, rel=1e-4)
    assert other["error_vs_default"]["ci95"] == pytest.approx([4, 4], rel=1e-4)
    assert other["error_vs_default"]["typical_ratio"] == pytest.approx(4, rel=1e-4)
    assert other["error_vs_default"]["typical_ci95"] == pytest.approx([4, 4], rel=1e-4)
    assert full["action_errors"] is full["action_error_ci95"] is full["drift"] is None
    assert set(ours["drift"]) <= {"25", "50", "100"}


class _Shifted:
    """A policy whose every action is a constant off."""

    def __init__(self, policy, shift):
        self._policy, self._shift = policy, shift
        self.noise_shape = policy.noise_shape

    def sample_actions(self, observation, noise=None):
        return self._policy.sample_actions(observation, noise) + np.float32(self._shift)
