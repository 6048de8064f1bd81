"""Robots whose chunks are late, and the table in the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from real_time_chunking import LatePolicy, jerk_ratio, robot_of, table

from omega_qvla.evaluation.rollout import chunk_noise

ROOT = Path(__file__).parents[2]


class Counting:
    """Its n-th chunk holds 100·n, 100·n + 1, …; it notes what it was told to continue."""

    noise_shape = (10, 4)

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def encode(self, observation: Any, left_over: Any) -> Any:
        self.asked.append(left_over)
        return observation

    def sample_batch(self, encoded: Any, noises: Any) -> list[np.ndarray]:
        assert all(noise.shape == self.noise_shape for noise in noises)
        number = len(self.asked) - len(encoded) + 1
        rows = np.arange(10, dtype=np.float32)[:, None]
        return [np.repeat(100 * (number + i) + rows, 4, axis=1) for i in range(len(encoded))]


def done(mode: str, delay: int, chunks: int = 3) -> tuple[list[list[float]], list[Any]]:
    """What a robot does between questions, and what its chunks were to continue."""
    policy: Any = Counting()
    late = LatePolicy(policy, mode, delay, [7])
    plans = [
        late.sample_actions({}, chunk_noise(7, number, late.noise_shape))
        for number in range(chunks)
    ]
    return [plan[:, 0].tolist() for plan in plans], policy.asked


def test_a_waiting_robot_holds_still_and_begins_every_chunk_anew() -> None:
    plans, asked = done("waiting", 2)
    assert plans == [[0, 0, *range(100 * n, 100 * n + 5)] for n in (1, 2, 3)]
    assert asked == [None] * 3


def test_a_switching_robot_goes_on_and_drops_what_is_past() -> None:
    plans, asked = done("switching", 2)
    assert plans == [[0, 0, 100, 101, 102], [103, 104, 202, 203, 204], [205, 206, 302, 303, 304]]
    assert asked == [None] * 3


def test_a_blending_robot_goes_over_within_two_steps_but_for_its_gripper() -> None:
    late = LatePolicy(Counting(), "blending", 2, [7])  # type: ignore[arg-type]
    noises = [chunk_noise(7, number, late.noise_shape) for number in range(2)]
    _, second = (late.sample_actions({}, noise) for noise in noises)
    np.testing.assert_allclose(second[2:, 0], [105 + 97 / 3, 106 + 2 * 97 / 3, 204], rtol=1e-6)
    assert second[2:, 3].tolist() == [202, 203, 204]


def test_a_real_time_robot_sends_what_it_will_carry_out() -> None:
    plans, asked = done("real-time", 2)
    assert plans == done("switching", 2)[0]
    assert asked[0] is None and [left.delay for left in asked[1:]] == [2, 2]
    assert asked[1].actions[:, 0].tolist() == list(range(103, 110))
    assert asked[2].actions[:, 0].tolist() == list(range(205, 210))


def test_a_robot_that_runs_out_of_actions_holds_still() -> None:
    """Chunks of ten, asked for every six steps: the last two steps before an answer have none."""
    plans, asked = done("real-time", 6)
    assert plans == [[0] * 6, [*range(100, 106)], [*range(206, 210), 0, 0]]
    assert [(left.delay, len(left.actions)) for left in asked[1:]] == [(6, 10), (4, 4)]


def test_episodes_side_by_side_are_told_apart_by_their_noise_and_start_again_when_asked_to() -> (
    None
):
    policy: Any = Counting()
    late = LatePolicy(policy, "real-time", 2, [1, 2])
    first = [chunk_noise(seed, 0, late.noise_shape) for seed in (1, 2)]
    late.sample_batch([{}, {}], first)
    late.sample_batch([{}], [chunk_noise(2, 1, late.noise_shape)])
    assert policy.asked[2].actions[0, 0] == 203
    late.sample_batch([{}, {}], first)  # a simulator died
    assert policy.asked[3:] == [None, None]


@pytest.mark.parametrize("delay", [0, 2, 4, 6])
def test_every_robot_plans_as_many_steps_as_it_says(delay: int) -> None:
    for mode in ("waiting", "switching", "blending", "real-time"):
        plans, _ = done(mode, delay)
        assert {len(plan) for plan in plans} == {robot_of(mode, delay).steps}


def test_jerk_is_compared_on_the_episodes_that_both_have() -> None:
    def cell(*jerks: float) -> dict[str, Any]:
        records = [SimpleNamespace(task="t", seed=i, jerk=jerk) for i, jerk in enumerate(jerks)]
        return {"per_episode": [vars(record) for record in records]}

    assert jerk_ratio(cell(1.0, 2.0, 9.0), cell(2.0, 4.0)) == 0.5
    assert jerk_ratio(cell(), cell(1.0)) is None


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "real-time-chunking.json").read_text())
    text = (ROOT / "docs" / "real-time-chunking.md").read_text("utf-8")
    shown = text.partition("<!-- table -->\n")[2].partition("\n<!-- /table -->")[0]
    assert shown == table(found)
