"""What a simulator may be, and what is said of one that is something else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omega_qvla.environments import MOST_STEPS, RendersOnDemand, action_limits, begin, carry_out
from omega_qvla.errors import SimulatorError
from omega_qvla.evaluation.simulators.simulator_process import _Server

SEEN = {"images": {"base": np.zeros((2, 2, 3), np.uint8)}, "state": np.zeros(2), "prompt": "go"}
ONE = np.ones(2, np.float32)


class Counter:
    """Ends at its ``goal``, solved, or after ``limit`` steps."""

    def __init__(self, goal: int = 4, limit: int = 6, **changed: Any) -> None:
        self.action_space = SimpleNamespace(low=-2 * ONE, high=3 * ONE)
        self.goal, self.limit, self.count, self.changed = goal, limit, 0, changed

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.count = 0
        return self.changed.get("reset", (SEEN, {}))

    def step(self, action: Any) -> Any:
        self.count += 1
        solved = self.count == self.goal
        usual = (SEEN, 0.0, solved, self.count == self.limit, {"is_success": solved})
        return self.changed.get("step", usual)

    def close(self) -> None:
        pass


class Lazy(Counter):
    """Counts its pictures."""

    pictures = 0

    def advance(self, action: Any) -> tuple[bool, bool, dict[str, Any]]:
        return super().step(action)[2:]

    def step(self, action: Any) -> Any:
        raise AssertionError("a picture of every step")

    def observe(self) -> dict[str, Any]:
        self.pictures += 1
        return SEEN


@pytest.mark.parametrize("kind", [Counter, Lazy])
def test_an_episode_ends_where_it_is_solved_or_its_time_is_over(kind: type[Counter]) -> None:
    env = kind(goal=4, limit=6)
    assert begin(env, 0) is SEEN
    first, second = carry_out(env, [ONE] * 3), carry_out(env, [ONE] * 3)
    assert (first.steps, first.success, first.observation) == (3, False, SEEN)
    assert (second.steps, second.success, second.observation) == (1, True, None)
    env = kind(goal=9, limit=2)
    begin(env, 0)
    assert carry_out(env, [ONE] * 3) == type(first)(2, False, None)


def test_pictures_are_taken_only_where_the_policy_looks() -> None:
    env = Lazy(goal=19, limit=20)
    assert isinstance(env, RendersOnDemand) and not isinstance(Counter(), RendersOnDemand)
    for _ in range(3):
        carry_out(env, [ONE] * 5)
    assert env.pictures == 3


def test_limits_are_those_of_the_action_space() -> None:
    low, high = action_limits(Counter())
    assert low.tolist() == [-2, -2] and high.tolist() == [3, 3] and low.dtype == np.float32


@pytest.mark.parametrize(
    "space",
    [
        None,
        SimpleNamespace(n=4),
        SimpleNamespace(low=np.zeros((2, 2)), high=np.ones((2, 2))),
        SimpleNamespace(low=np.zeros(2, int), high=np.ones(2, int)),
    ],
)
def test_an_action_space_that_is_no_box_is_refused(space: Any) -> None:
    env = Counter()
    env.action_space = space
    with pytest.raises(SimulatorError, match="Counter: action_space must be"):
        action_limits(env)


@pytest.mark.parametrize(
    "seen",
    [
        np.zeros(3),
        {},
        {**SEEN, "images": np.zeros((2, 2, 3), np.uint8)},
        {**SEEN, "images": {"base": np.zeros((2, 2, 3), np.float32)}},
        {**SEEN, "images": {"base": np.zeros((2, 2), np.uint8)}},
        {**SEEN, "state": np.zeros((1, 2))},
        {**SEEN, "prompt": None},
        {"pixels": SEEN["images"], "agent_pos": SEEN["state"]},
    ],
)
def test_observations_of_another_form_are_refused_with_what_they_are(seen: Any) -> None:
    with pytest.raises(SimulatorError, match=r"Counter: an observation must be .*prompt.*it is"):
        begin(Counter(reset=(seen, {})), 0)
    with pytest.raises(SimulatorError, match="an observation must be"):
        carry_out(Counter(step=(seen, 0.0, False, False, {})), [ONE])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reset": SEEN}, r"reset\(seed=\.\.\.\) must return \(observation, info\)"),
        ({"step": (SEEN, 0.0, True, {})}, r"step must return \(observation, reward, terminated"),
        ({"step": (SEEN, 0.0, True, False, {"success": 1})}, "must have 'is_success'"),
    ],
)
def test_gyms_older_forms_and_a_missing_success_are_refused(
    changed: dict[str, Any], told: str
) -> None:
    env = Counter(**changed)
    with pytest.raises(SimulatorError, match=told):
        begin(env, 0)
        carry_out(env, [ONE])


def test_an_episode_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = SimpleNamespace(Endless=lambda task: Counter(goal=-1, limit=-1))
    monkeypatch.setitem(__import__("sys").modules, "endless", endless)
    server = _Server()
    start = {"environment": "endless:Endless", "options": {}, "task": "any", "seed": 0}
    assert server.answer({"start": start})["low"].tolist() == [-2, -2]
    assert server.answer({"actions": np.ones((MOST_STEPS - 1, 2))})["steps"] == MOST_STEPS - 1
    with pytest.raises(SimulatorError, match="TimeLimit"):
        server.answer({"actions": np.ones((1, 2))})
