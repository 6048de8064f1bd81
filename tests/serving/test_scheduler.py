"""Queue, deadlines, batches and safety, without a socket."""

from __future__ import annotations

import time

import numpy as np
import pytest
from fake_serving import ARTIFACT, REQUEST, FakeEngine, ask, code_of, make_scheduler, submit
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.serving.server.request_queue import PendingRequest, RequestQueue
from omega_qvla.serving.server.safety import ActionLimits
from omega_qvla.serving.server.scheduler import BatchingConfig, Reply


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def pending(client: int, arrived: float = 0.0, expires: float = 10.0) -> PendingRequest:
    return PendingRequest(client, REQUEST, arrived, expires, lambda outcome: None)


def test_the_newest_request_of_a_client_replaces_the_older_and_keeps_its_place() -> None:
    queue = RequestQueue(2)
    old, other, new = pending(1), pending(2), pending(1)
    assert queue.offer(old, 0.0) == [] and queue.offer(other, 0.0) == []
    ((left, error),) = queue.offer(new, 0.0)
    assert left is old and error.code == "superseded"
    assert queue.take(5, 0.0) == ([new, other], [])


def test_a_full_line_refuses_the_newcomer_and_a_late_request_makes_room() -> None:
    queue = RequestQueue(1)
    queue.offer(pending(1, expires=1.0), 0.0)
    ((left, error),) = queue.offer(pending(2), 0.5)
    assert left.client == 2 and error.code == "overloaded"
    ((left, error),) = queue.offer(pending(3), 1.5)
    assert left.client == 1 and error.code == "stale" and "1500 ms" in str(error)
    assert len(queue) == 1 and not queue.withdraw(1) and queue.withdraw(3) and len(queue) == 0


def test_in_a_full_line_who_has_just_come_gives_way_and_who_has_waited_does_not() -> None:
    queue = RequestQueue(3, yields_s=0.02)
    first, second, third = pending(1), pending(2), pending(3)
    for one, now in ((first, 0.0), (second, 0.05), (third, 0.06)):
        queue.offer(one, now)
    newest = pending(4)
    ((left, error),) = queue.offer(newest, 0.065)
    assert left is second and error.code == "overloaded" and "3 other requests" in str(error)
    again = pending(3)
    ((left, error),) = queue.offer(again, 0.07)  # its client keeps place and time
    assert left is third and error.code == "superseded"
    late = pending(5)
    ((left, _),) = queue.offer(late, 0.09)
    assert left is late
    assert queue.take(3, 0.1)[0] == [first, again, newest]


@given(st.lists(st.tuples(st.floats(0.0, 0.05), st.integers(0, 9)), max_size=60))
def test_nobody_hears_late_that_there_was_no_room(events: list[tuple[float, int]]) -> None:
    """A refusal for want of room comes within the moment in which a place may be lost."""
    queue = RequestQueue(2, yields_s=0.02)
    came: dict[int, float] = {}
    now = 0.0
    for passes, client in events:
        now += passes
        if client == 9:
            queue.take(1, now)
            continue
        leaving = queue.offer(pending(client, now, now + 10.0), now)
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
def test_every_request_leaves_the_line_exactly_once(
    places: int, limit: int, yields_s: float, events: list[tuple[int, bool]]
) -> None:
    """Whatever comes: bounded, one per client, nothing lost, nothing twice."""
    queue = RequestQueue(places, yields_s)
    entered, left = [], []
    for now, (client, taking) in enumerate(events):
        if taking:
            taken, expired = queue.take(limit, now)
            left += [*taken, *(one for one, _ in expired)]
            assert len(taken) <= limit
        else:
            entered.append(pending(client, now, now + 3.0))
            left += [one for one, _ in queue.offer(entered[-1], now)]
        assert len(queue) <= places
    left += queue.clear()
    assert sorted(map(id, left)) == sorted(map(id, entered))


def test_a_reply_says_what_computed_it_and_how_old_it_is(engine: FakeEngine) -> None:
    scheduler = make_scheduler(engine)
    scheduler.start()
    reply = ask(scheduler, request_id="one", age_ms=20.0)
    assert isinstance(reply, Reply)
    assert reply.request_id == "one" and reply.artifact == ARTIFACT
    assert reply.actions.shape == (5, 3) and reply.actions.dtype == np.float32
    assert 0.02 <= reply.age_s < 1.0 and reply.queue_s >= 0.0
    assert ask(scheduler).request_id != ask(scheduler).request_id


def test_noise_comes_from_the_request_or_from_the_generator(engine: FakeEngine) -> None:
    scheduler = make_scheduler(engine)
    scheduler.start()
    noise = np.ones((5, 3), np.float32)
    fixed = [ask(scheduler, prompt="noise", noise=noise).actions for _ in range(2)]
    drawn = [ask(scheduler, prompt="noise").actions for _ in range(2)]
    assert np.array_equal(*fixed) and np.allclose(fixed[0], 1.5)
    assert not np.array_equal(*drawn)


def test_what_waits_is_computed_together_and_every_robot_gets_its_own(engine: FakeEngine) -> None:
    scheduler = make_scheduler(
        engine, batching=BatchingConfig(batch=3, waiting=4, deadline_s=5.0, yields_s=0.0)
    )
    engine.gate.clear()
    scheduler.start()
    first = submit(scheduler, 0, value=0.0)
    assert engine.started.wait(5)
    others = [submit(scheduler, i, value=float(i)) for i in (1, 2, 3, 4)]
    assert code_of(submit(scheduler, 5)(1.0)) == "overloaded"
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
    scheduler = make_scheduler(engine, log=lambda event, **fields: events.append(event))
    engine.gate.clear()
    scheduler.start()
    blocker = submit(scheduler, "first")
    assert engine.started.wait(5)
    bad, good = submit(scheduler, "bad", prompt=prompt), submit(scheduler, "good")
    engine.gate.set()
    error = bad(5.0)
    assert code_of(error) == code and told in str(error) and "secret" not in str(error)
    assert isinstance(good(5.0), Reply) and isinstance(blocker(5.0), Reply)
    assert isinstance(ask(scheduler), Reply)
    assert scheduler.metrics.counted("requests_total", code) == 1
    if code == "internal":
        assert "internal_error" in events
    if code == "unsafe_action":
        assert (
            f'rule="{"not_finite" if prompt == "nan" else "limits"}"}} 1'
            in scheduler.metrics.render()
        )


def test_what_waited_past_its_deadline_is_an_explicit_error(engine: FakeEngine) -> None:
    scheduler = make_scheduler(engine)
    engine.gate.clear()
    scheduler.start()
    submit(scheduler, "first")
    assert engine.started.wait(5)
    late = submit(scheduler, "late", deadline_ms=10.0)
    time.sleep(0.05)
    engine.gate.set()
    assert code_of(late(5.0)) == "stale"


def test_an_answer_that_took_too_long_is_withheld() -> None:
    scheduler = make_scheduler(FakeEngine(seconds=0.05))
    scheduler.start()
    assert code_of(ask(scheduler, deadline_ms=20.0)) == "stale"
    assert code_of(ask(scheduler, deadline_ms=500.0, age_ms=600.0)) == "stale"
    assert isinstance(ask(scheduler, deadline_ms=5000.0), Reply)


def test_a_client_that_is_gone_is_not_computed(engine: FakeEngine) -> None:
    scheduler = make_scheduler(engine)
    engine.gate.clear()
    scheduler.start()
    first = submit(scheduler, "first")
    assert engine.started.wait(5)
    submit(scheduler, "gone")
    scheduler.withdraw("gone")
    engine.gate.set()
    first(5.0)
    assert isinstance(ask(scheduler), Reply) and sum(engine.sizes) == 2


def test_draining_finishes_what_waits_and_refuses_what_comes(engine: FakeEngine) -> None:
    engine.seconds = 0.05
    scheduler = make_scheduler(engine)
    scheduler.start()
    waits = [submit(scheduler, i) for i in range(2)]
    assert scheduler.drain(5.0)
    assert all(isinstance(wait(1.0), Reply) for wait in waits)
    assert code_of(ask(scheduler)) == "draining"


def test_draining_ends_in_time_even_if_the_policy_does_not(engine: FakeEngine) -> None:
    engine.gate.clear()
    scheduler = make_scheduler(engine)
    scheduler.start()
    submit(scheduler, "first")
    assert engine.started.wait(5)
    waiting = submit(scheduler, "second")
    started = time.monotonic()
    assert not scheduler.drain(0.2)
    assert time.monotonic() - started < 1.0 and code_of(waiting(1.0)) == "draining"
    engine.gate.set()


def test_the_deadline_follows_the_warm_up_unless_it_is_given() -> None:
    scheduler = make_scheduler(FakeEngine(seconds=0.3), batching=BatchingConfig(batch=2, waiting=2))
    slowest = scheduler.warm_up({"prompt": "warm", "state": np.zeros(4, np.float32)})
    assert slowest >= 0.3 and scheduler.deadline_s == pytest.approx(4 * slowest, rel=0.01)
    given = make_scheduler(FakeEngine(), batching=BatchingConfig(deadline_s=0.5))
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
    scheduler = make_scheduler(engine)
    scheduler.start()
    ask(scheduler)
    ask(scheduler, prompt="nan")
    text = scheduler.metrics.render()
    assert 'omega_qvla_requests_total{outcome="answered"} 1' in text
    assert 'omega_qvla_reply_seconds_bucket{le="+Inf"} 1' in text
    assert "# TYPE omega_qvla_waiting gauge" in text and text.endswith("\n")
    names = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert all(name.startswith("omega_qvla_") for name in names)
