"""Robots that ask one thing at a time are served as long as their deadlines can be kept."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
from fake_serving import FakeEngine, make_core, observation
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.errors import ServingError
from omega_qvla.serving.server.forecast import Forecast
from omega_qvla.serving.server.request_queue import Admission, Ticket
from omega_qvla.serving.server.scheduler import Core, Rules
from omega_qvla.serving.wire.specification import parse_request


def outcomes(core: Core, robots: int, requests: int) -> Counter[str]:
    """How requests end where every robot asks again inside the delivery of its answer.

    No robot can ask earlier than that: the computing thread itself puts the request into the line.
    The first robot's request is already computed when the others come.
    """
    request = parse_request(observation(), core.specification)
    ended: Counter[str] = Counter()
    lock, done = threading.Lock(), threading.Event()
    left = requests

    def ask(robot: int) -> None:
        nonlocal left
        with lock:
            if left:
                left -= 1
                asking = True
            else:
                asking = False
        if asking:
            core.submit(robot, request, lambda outcome: heard(robot, outcome))

    def heard(robot: int, outcome: Any) -> None:
        with lock:
            ended[outcome.code if isinstance(outcome, ServingError) else "answered"] += 1
            if sum(ended.values()) == requests:
                done.set()
        ask(robot)

    engine: Any = core._engine
    engine.gate.clear()
    core.start()
    ask(0)
    assert engine.started.wait(10)
    for robot in range(1, robots):
        ask(robot)
    engine.gate.set()
    assert done.wait(60), ended
    return ended


EACH = [1, 2, 5, 16]
"""How many robots, in seconds; the slow test takes every number from 1 to 16."""


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
@pytest.mark.parametrize("requests", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_robot_is_refused_below_capacity(batch: int, requests: int) -> None:
    """Whatever the batch, and with no more places in the line than other robots."""
    for robots in EACH if requests == 100 else range(1, 17):
        for places in ({}, {"waiting": max(1, robots - 1)}):
            core = make_core(FakeEngine(), rules=Rules(batch=batch, deadline_s=60.0, **places))
            assert outcomes(core, robots, requests) == {"answered": requests}, robots
            core.drain(1.0)


def test_two_robots_share_a_line_of_one() -> None:
    """One is computed and one waits: the first one's next request finds the other one's gone."""
    core = make_core(FakeEngine(seconds=0.001), rules=Rules(batch=1, waiting=1, deadline_s=60.0))
    assert outcomes(core, 2, 200) == {"answered": 200}


# --- with a clock of its own -----------------------------------------------------------------


def simulated(robots: int, batch: int, times: list[float], deadline_s: float) -> Counter[str]:
    """What robots hear that ask again at once, or a tick after a refusal; 40 batches long.

    Args:
        robots: how many.
        batch: observations in one at most.
        times: seconds of a batch of 1, 2, … observations.
        deadline_s: of every request.
    """
    line: Admission[None, None] = Admission(256)
    forecast = Forecast(batch)
    for size in (1, batch):
        forecast.record(size, times[size - 1])
    heard: Counter[str] = Counter()
    now = 0.0

    def ask(robot: int, begins: float) -> None:
        ticket: Ticket[None, None] = Ticket(robot, None, now, now + deadline_s, lambda _: None)
        leaving = line.offer(ticket, now, lambda ahead: begins + forecast.wait_s(ahead))
        heard.update(error.code for _, error in leaving)
        again.extend(int(str(left.client)) for left, _ in leaving)

    again: list[int] = []
    asking = list(range(robots))
    for _ in range(40):
        taken, expired = line.take(batch, now)
        heard.update(error.code for _, error in expired)
        asking += [int(str(left.client)) for left, _ in expired] + again
        again.clear()
        begins = now + (times[len(taken) - 1] if taken else 0.0)
        for robot in asking:
            ask(robot, begins)
        now = begins if taken else now + 1e-3
        if taken:
            forecast.record(len(taken), times[len(taken) - 1])
        late = [one for one in taken if one.expires <= now]
        heard.update(["stale"] * len(late) + ["answered"] * (len(taken) - len(late)))
        asking = [int(str(one.client)) for one in taken]
    return heard


growing = st.lists(st.floats(0.001, 0.05), min_size=8, max_size=8).map(sorted)


@settings(max_examples=50, deadline=None)
@given(robots=st.integers(1, 16), batch=st.sampled_from([1, 2, 4, 8]), times=growing)
def test_within_capacity_the_forecast_refuses_nobody(
    robots: int, batch: int, times: list[float]
) -> None:
    """The deadline is the longest any of them can wait: a batch that runs, and all the others."""
    forecast = Forecast(batch)
    for size, seconds in enumerate(times[:batch], 1):
        forecast.record(size, seconds)
    longest = times[batch - 1] + forecast.wait_s(robots - 1)
    heard = simulated(robots, batch, times, longest + 1e-6)
    assert set(heard) == {"answered"}


@settings(max_examples=20, deadline=None)
@given(robots=st.integers(40, 80), batch=st.sampled_from([1, 2]), times=growing)
def test_beyond_capacity_some_are_refused_at_once_and_nobody_waits_in_vain(
    robots: int, batch: int, times: list[float]
) -> None:
    """Ten batches can be waited for, and more robots ask: who is let in is answered in time."""
    heard = simulated(robots, batch, times, 10 * times[batch - 1])
    assert heard["overloaded"] > 0 and heard["stale"] == 0
    assert heard["answered"] >= 30 * batch


def test_a_forecast_goes_by_the_median_and_never_guesses_high() -> None:
    forecast = Forecast(4)
    assert forecast.wait_s(100) == 0.0
    for seconds in (0.1, 0.1, 5.0):
        forecast.record(1, seconds)
    assert forecast.seconds(1) == forecast.seconds(3) == 0.1
    forecast.record(4, 0.3)
    assert forecast.seconds(3) == 0.1
    assert forecast.wait_s(0) == 0.1 and forecast.wait_s(3) == 0.3
    assert forecast.wait_s(8) == pytest.approx(0.7)


def test_a_deadline_that_cannot_be_kept_behind_others_is_refused_at_once() -> None:
    """A batch takes 50 ms, its robot's deadline is 70: alone it is served, behind two it is not."""
    engine = FakeEngine(seconds=0.05)
    core = make_core(engine, rules=Rules(batch=1, deadline_s=60.0))
    core.warm_up({"prompt": "warm", "state": observation()["state"]})
    core.start()
    told: dict[str, Any] = {}
    done = threading.Event()

    def submit(name: str, deadline_ms: float) -> None:
        def deliver(outcome: Any) -> None:
            told[name] = outcome
            if len(told) == 3:
                done.set()

        request = parse_request(observation(deadline_ms=deadline_ms), core.specification)
        core.submit(name, request, deliver)

    engine.gate.clear()
    engine.started.clear()
    submit("computed", 60_000.0)
    assert engine.started.wait(5)
    submit("waits", 60_000.0)
    started = time.monotonic()
    submit("short", 70.0)
    assert time.monotonic() - started < 0.05 and told["short"].code == "overloaded"
    assert "after its deadline" in str(told["short"])
    engine.gate.set()
    assert done.wait(5)
    assert not isinstance(told["computed"], ServingError)
    assert not isinstance(told["waits"], ServingError)
