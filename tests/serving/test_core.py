"""Line, deadlines, batches and safety, without a socket."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from fake_serving import ARTIFACT, FakeEngine, ask, code_of, make_core, submit
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.serving.server.request_queue import Admission, Ticket
from omega_qvla.serving.server.safety import ActionLimits
from omega_qvla.serving.server.scheduler import Reply, Rules


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def ticket(client: int, arrived: float = 0.0, expires: float = 10.0) -> Ticket[Any, Any]:
    return Ticket(client, None, arrived, expires, lambda outcome: None)


def test_the_newest_request_of_a_client_replaces_the_older_and_keeps_its_place() -> None:
    line: Admission[Any, Any] = Admission(2)
    old, other, new = ticket(1), ticket(2), ticket(1)
    assert line.offer(old, 0.0) == [] and line.offer(other, 0.0) == []
    ((left, error),) = line.offer(new, 0.0)
    assert left is old and error.code == "superseded"
    assert line.take(5, 0.0) == ([new, other], [])


def test_a_full_line_refuses_the_newcomer_and_a_late_request_makes_room() -> None:
    line: Admission[Any, Any] = Admission(1)
    line.offer(ticket(1, expires=1.0), 0.0)
    ((left, error),) = line.offer(ticket(2), 0.5)
    assert left.client == 2 and error.code == "overloaded"
    ((left, error),) = line.offer(ticket(3), 1.5)
    assert left.client == 1 and error.code == "stale" and "1500 ms" in str(error)
    assert len(line) == 1 and not line.withdraw(1) and line.withdraw(3) and len(line) == 0


def test_in_a_full_line_who_has_just_come_gives_way_and_who_has_waited_does_not() -> None:
    line: Admission[Any, Any] = Admission(3, yields_s=0.02)
    first, second, third = ticket(1), ticket(2), ticket(3)
    for one, now in ((first, 0.0), (second, 0.05), (third, 0.06)):
        line.offer(one, now)
    newest = ticket(4)
    ((left, error),) = line.offer(newest, 0.065)
    assert left is second and error.code == "overloaded" and "3 other requests" in str(error)
    again = ticket(3)
    ((left, error),) = line.offer(again, 0.07)  # its client keeps place and time
    assert left is third and error.code == "superseded"
    late = ticket(5)
    ((left, _),) = line.offer(late, 0.09)
    assert left is late
    assert line.take(3, 0.1)[0] == [first, again, newest]


@given(st.lists(st.tuples(st.floats(0.0, 0.05), st.integers(0, 9)), max_size=60))
def test_nobody_hears_late_that_there_was_no_room(events: list[tuple[float, int]]) -> None:
    """A refusal for want of room comes within the moment in which a place may be lost."""
    line: Admission[Any, Any] = Admission(2, yields_s=0.02)
    came: dict[int, float] = {}
    now = 0.0
    for passes, client in events:
        now += passes
        if client == 9:
            line.take(1, now)
            continue
        leaving = line.offer(ticket(client, now, now + 10.0), now)
        if not any(error.code == "superseded" for _, error in leaving):
            came[client] = now
        for left, error in leaving:
            if error.code == "overloaded":
                assert now - came.pop(left.client) < 0.02


@given(
    places=st.integers(1, 4),
    limit=st.integers(1, 4),
    yields_s=st.sampled_from([0.0, 1.5, 10.0]),
    events=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60),
)
def test_every_ticket_leaves_the_line_exactly_once(
    places: int, limit: int, yields_s: float, events: list[tuple[int, bool]]
) -> None:
    """Whatever comes: bounded, one per client, nothing lost, nothing twice."""
    line: Admission[Any, Any] = Admission(places, yields_s)
    entered, left = [], []
    for now, (client, taking) in enumerate(events):
        if taking:
            taken, expired = line.take(limit, now)
            left += [*taken, *(one for one, _ in expired)]
            assert len(taken) <= limit
        else:
            entered.append(ticket(client, now, now + 3.0))
            left += [one for one, _ in line.offer(entered[-1], now)]
        assert len(line) <= places
    left += line.clear()
    assert sorted(map(id, left)) == sorted(map(id, entered))


def test_a_reply_says_what_computed_it_and_how_old_it_is(engine: FakeEngine) -> None:
    core = make_core(engine)
    core.start()
    reply = ask(core, request_id="one", age_ms=20.0)
    assert isinstance(reply, Reply)
    assert reply.request_id == "one" and reply.artifact == ARTIFACT
    assert reply.actions.shape == (5, 3) and reply.actions.dtype == np.float32
    assert 0.02 <= reply.age_s < 1.0 and reply.queue_s >= 0.0
    assert ask(core).request_id != ask(core).request_id


def test_noise_comes_from_the_request_or_from_the_generator(engine: FakeEngine) -> None:
    core = make_core(engine)
    core.start()
    noise = np.ones((5, 3), np.float32)
    fixed = [ask(core, prompt="noise", noise=noise).actions for _ in range(2)]
    drawn = [ask(core, prompt="noise").actions for _ in range(2)]
    assert np.array_equal(*fixed) and np.allclose(fixed[0], 1.5)
    assert not np.array_equal(*drawn)


def test_what_waits_is_computed_together_and_every_robot_gets_its_own(engine: FakeEngine) -> None:
    core = make_core(engine, rules=Rules(batch=3, waiting=4, deadline_s=5.0, yields_s=0.0))
    engine.gate.clear()
    core.start()
    first = submit(core, 0, value=0.0)
    assert engine.started.wait(5)
    others = [submit(core, i, value=float(i)) for i in (1, 2, 3, 4)]
    assert code_of(submit(core, 5)(1.0)) == "overloaded"
    engine.gate.set()
    replies = [wait() for wait in (first, *others)]
    assert engine.sizes == [1, 3, 1]
    assert [float(reply.actions[0, 0]) for reply in replies] == [0, 1, 2, 3, 4]
    assert [reply.batch for reply in replies] == [1, 3, 3, 3, 1]


@pytest.mark.parametrize(
    ("prompt", "code", "told"),
    [
        ("unknown word", "bad_request", "never taught"),
        ("memory", "out_of_memory", "not enough memory"),
        ("bug", "internal", "log says how"),
        ("nan", "unsafe_action", "step 2, dimension 1"),
        ("far", "unsafe_action", "11 is above its limit (10)"),
    ],
)
def test_one_robots_trouble_is_not_its_neighbours(
    engine: FakeEngine, prompt: str, code: str, told: str
) -> None:
    """In one batch: the bad one gets an error that says what is wrong, the good one its actions."""
    events: list[str] = []
    core = make_core(engine, log=lambda event, **fields: events.append(event))
    engine.gate.clear()
    core.start()
    blocker = submit(core, "first")
    assert engine.started.wait(5)
    bad, good = submit(core, "bad", prompt=prompt), submit(core, "good")
    engine.gate.set()
    error = bad(5.0)
    assert code_of(error) == code and told in str(error) and "secret" not in str(error)
    assert isinstance(good(5.0), Reply) and isinstance(blocker(5.0), Reply)
    assert isinstance(ask(core), Reply)
    assert core.metrics.counted("requests_total", code) == 1
    if code == "internal":
        assert "internal_error" in events
    if code == "unsafe_action":
        assert (
            f'rule="{"not_finite" if prompt == "nan" else "limits"}"}} 1' in core.metrics.render()
        )


def test_what_waited_past_its_deadline_is_an_explicit_error(engine: FakeEngine) -> None:
    core = make_core(engine)
    engine.gate.clear()
    core.start()
    submit(core, "first")
    assert engine.started.wait(5)
    late = submit(core, "late", deadline_ms=10.0)
    time.sleep(0.05)
    engine.gate.set()
    assert code_of(late(5.0)) == "stale"


def test_an_answer_that_took_too_long_is_withheld() -> None:
    core = make_core(FakeEngine(seconds=0.05))
    core.start()
    assert code_of(ask(core, deadline_ms=20.0)) == "stale"
    assert code_of(ask(core, deadline_ms=500.0, age_ms=600.0)) == "stale"
    assert isinstance(ask(core, deadline_ms=5000.0), Reply)


def test_a_client_that_is_gone_is_not_computed(engine: FakeEngine) -> None:
    core = make_core(engine)
    engine.gate.clear()
    core.start()
    first = submit(core, "first")
    assert engine.started.wait(5)
    submit(core, "gone")
    core.withdraw("gone")
    engine.gate.set()
    first(5.0)
    assert isinstance(ask(core), Reply) and sum(engine.sizes) == 2


def test_draining_finishes_what_waits_and_refuses_what_comes(engine: FakeEngine) -> None:
    engine.seconds = 0.05
    core = make_core(engine)
    core.start()
    waits = [submit(core, i) for i in range(2)]
    assert core.drain(5.0)
    assert all(isinstance(wait(1.0), Reply) for wait in waits)
    assert code_of(ask(core)) == "draining"


def test_draining_ends_in_time_even_if_the_policy_does_not(engine: FakeEngine) -> None:
    engine.gate.clear()
    core = make_core(engine)
    core.start()
    submit(core, "first")
    assert engine.started.wait(5)
    waiting = submit(core, "second")
    started = time.monotonic()
    assert not core.drain(0.2)
    assert time.monotonic() - started < 1.0 and code_of(waiting(1.0)) == "draining"
    engine.gate.set()


def test_the_deadline_follows_the_warm_up_unless_it_is_given() -> None:
    core = make_core(FakeEngine(seconds=0.3), rules=Rules(batch=2, waiting=2))
    slowest = core.warm_up({"prompt": "warm", "state": np.zeros(4, np.float32)})
    assert slowest >= 0.3 and core.deadline_s == pytest.approx(4 * slowest, rel=0.01)
    given = make_core(FakeEngine(), rules=Rules(deadline_s=0.5))
    given.warm_up({"prompt": "warm", "state": np.zeros(4, np.float32)})
    assert given.deadline_s == 0.5


actions = st.floats(-2.0, 2.0, width=32) | st.sampled_from([np.nan, np.inf, -np.inf])
chunks = st.lists(actions, min_size=6, max_size=6)
bounds = st.floats(0.1, 2.0) | st.just(np.inf)


@given(values=chunks, high=bounds, change=st.floats(0.1, 4.0) | st.just(np.inf))
def test_limits_let_pass_exactly_what_is_within_them(
    values: list[float], high: float, change: float
) -> None:
    limits = ActionLimits((-high,) * 2, (high,) * 2, (change, np.inf))
    chunk = np.array(values, np.float32).reshape(3, 2)
    safe = bool(np.isfinite(chunk).all())
    if safe:
        steps = np.abs(np.diff(chunk[:, 0].astype(float)))
        slack = 1e-6 * (1 + high), 1e-6 * (1 + change)
        safe = bool((np.abs(chunk) <= high + slack[0]).all() and (steps <= change + slack[1]).all())
    try:
        limits.check(chunk)
        passed = True
    except Exception:
        passed = False
    assert passed == safe


def test_metrics_are_what_prometheus_reads(engine: FakeEngine) -> None:
    core = make_core(engine)
    core.start()
    ask(core)
    ask(core, prompt="nan")
    text = core.metrics.render()
    assert 'omega_qvla_requests_total{outcome="answered"} 1' in text
    assert 'omega_qvla_reply_seconds_bucket{le="+Inf"} 1' in text
    assert "# TYPE omega_qvla_waiting gauge" in text and text.endswith("\n")
    names = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert all(name.startswith("omega_qvla_") for name in names)
