"""The robot's side: chunks that overlap, servers that vanish, and the loop that acts in time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_serving import FakeEngine, make_scheduler, observation, running
from hypothesis import given
from hypothesis import strategies as st

import omega_qvla as oq
from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.serving.client.action_queue import ActionQueue, Blending

pytest.importorskip("websockets", reason="the extra serve is not installed")

from omega_qvla.serving.client import RemotePolicy, RetryPolicy, drive
from omega_qvla.serving.server.protocol_server import Listening
from omega_qvla.serving.server.protocols.openpi import OpenpiServer

pytestmark = pytest.mark.long


def chunk(first: float, length: int = 6, width: int = 2) -> np.ndarray:
    """Actions that count: first, first + 1, …"""
    return np.repeat(first + np.arange(length, dtype=np.float32)[:, None], width, axis=1)


def test_actions_come_in_order_and_what_is_past_is_dropped() -> None:
    queue = ActionQueue(Blending(ticks=0))
    assert queue.merge(chunk(0.0), 0, 0) == 0
    assert [float(queue.next(tick)[0][0]) for tick in range(3)] == [0, 1, 2]
    assert queue.merge(chunk(101.0), 1, 3) == 2
    assert [float(queue.next(tick)[0][0]) for tick in range(3, 7)] == [103, 104, 105, 106]
    assert queue.left(7) == 0


def test_chunks_blend_over_the_ticks_asked_for_and_decisions_switch() -> None:
    """Weights 1/3, 2/3, 1 with two blended ticks; the second dimension switches at once."""
    queue = ActionQueue(Blending(ticks=2, switched=(1,)))
    queue.merge(np.zeros((6, 2)), 0, 0)
    queue.merge(np.full((6, 2), 3.0), 2, 2)
    actions = np.array([queue.next(tick)[0] for tick in range(2, 6)])
    np.testing.assert_allclose(actions[:, 0], [1, 2, 3, 3], atol=1e-6)
    np.testing.assert_allclose(actions[:, 1], 3.0)


def test_the_source_of_an_action_is_its_newest_observation() -> None:
    queue = ActionQueue()
    queue.merge(chunk(0.0), 0, 0)
    assert queue.next(0)[1] == 0
    queue.merge(chunk(0.0), 1, 2)
    assert queue.next(2)[1] == 1
    assert queue.merge(chunk(9.0), 0, 3) == 6 and float(queue.next(3)[0][0]) < 9


def test_being_late_holds_or_stops_as_decided() -> None:
    stopping = ActionQueue(Blending(late="stop"))
    stopping.merge(chunk(0.0, 1), 0, 0)
    stopping.next(0)
    with pytest.raises(ServingError, match="tick 1"):
        stopping.next(1)
    holding = ActionQueue(Blending(late="hold"))
    with pytest.raises(ServingError):
        holding.next(0)
    holding.merge(chunk(5.0, 1), 0, 0)
    holding.next(0)
    action, source = holding.next(1)
    assert float(action[0]) == 5.0 and source is None and holding.late == 2
    still = ActionQueue(Blending(late="hold", hold_action=(0.0, 0.0)))
    still.merge(chunk(5.0, 1), 0, 0)
    still.next(0)
    assert np.array_equal(still.next(1)[0], [0, 0])


@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20),
    change=st.floats(0.0625, 2.0),
)
def test_executed_actions_never_change_faster_than_allowed(
    values: list[float], change: float
) -> None:
    queue = ActionQueue(Blending(ticks=0, change=(change,)))
    queue.merge(np.array(values)[:, None], 0, 0)
    done = np.array([queue.next(tick)[0][0] for tick in range(len(values))])
    assert np.all(np.abs(np.diff(done)) <= change + 1e-5)


@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 8), st.integers(1, 8)), max_size=12
    ),
    ticks=st.integers(0, 5),
)
def test_whatever_arrives_no_past_action_is_executed(
    arrivals: list[tuple[int, int, int]], ticks: int
) -> None:
    """Chunks hold their own tick as value: blends of equal plans give the tick itself."""
    queue = ActionQueue(Blending(ticks=ticks, late="hold", hold_action=(-1.0,)))
    due = {tick + delay: (tick, length) for tick, delay, length in arrivals}
    for tick in range(40):
        if tick in due and due[tick][0] <= tick:
            observed, length = due[tick]
            queue.merge(chunk(float(observed), length, 1), observed, tick)
        action = float(queue.next(tick)[0][0])
        assert action == -1.0 or action == pytest.approx(tick, abs=1e-4)


@pytest.mark.parametrize("bad", [np.zeros(3), np.full((2, 2), np.nan)])
def test_a_chunk_that_is_none_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(PolicyError):
        ActionQueue().merge(bad, 0, 0)


def test_a_remote_policy_answers_as_a_local_one_and_explains_errors() -> None:
    scheduler = make_scheduler(FakeEngine())
    scheduler.start()
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        assert policy.noise_shape == (5, 3)
        noise = np.ones((5, 3), np.float64)
        assert np.allclose(policy.sample_actions(observation("noise"), noise), 1.5)
        with pytest.raises(ServingError, match="never taught") as refused:
            policy.sample_actions(observation("unknown word"))
        assert refused.value.code == "bad_request"
        with pytest.raises(ServingError) as stale:
            policy.sample_actions(observation(), deadline_ms=0.0)
        assert stale.value.code == "stale" and policy.reconnections == 0


def test_a_robot_that_asked_nothing_for_long_is_served_over_a_new_connection() -> None:
    """It answered no ping meanwhile."""
    scheduler = make_scheduler(FakeEngine())
    scheduler.start()
    server = OpenpiServer(scheduler, Listening(ping_s=0.1))
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        policy.infer(observation())
        time.sleep(1.0)
        assert np.all(policy.infer(observation())["actions"] == 0.5)
        assert policy.reconnections == 1


def test_a_server_that_comes_back_is_found_again() -> None:
    """It is not there at the first attempt, and is at the third."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            back.enter_context(running(OpenpiServer(again, Listening(port=port))))

    again = make_scheduler(FakeEngine())
    again.start()
    scheduler = make_scheduler(FakeEngine())
    scheduler.start()
    with contextlib.ExitStack() as back:
        with running(OpenpiServer(scheduler, Listening())) as service:
            port = service.port
            policy = RemotePolicy(f"ws://127.0.0.1:{port}", sleep=sleep)
            assert policy.sample_actions(observation()).shape == (5, 3)
        assert policy.sample_actions(observation()).shape == (5, 3)
        assert policy.reconnections == 1 and pauses == [0.1, 0.2]
        policy.close()


def test_a_robot_that_reconnects_is_answered_for_its_new_observation() -> None:
    """While its old request is still computed; that one's actions go nowhere."""
    engine = FakeEngine()
    scheduler = make_scheduler(engine)
    scheduler.start()
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        engine.gate.clear()
        with pytest.raises(ServingError) as late:
            policy.infer(observation(value=1.0), deadline_ms=100.0)
        assert late.value.code == "stale"
        threading.Timer(0.2, engine.gate.set).start()
        assert np.all(policy.infer(observation(value=2.0))["actions"] == 2.0)
        assert policy.reconnections == 1


def test_a_server_that_is_not_there_is_an_error_after_growing_pauses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pauses: list[float] = []
    with pytest.raises(ServingError, match="4 attempts") as gone:
        RemotePolicy(
            f"ws://127.0.0.1:{port}", retry_policy=RetryPolicy(attempts=4), sleep=pauses.append
        )
    assert gone.value.code == "unreachable" and pauses == [0.1, 0.2, 0.4]


def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    engine = FakeEngine()
    scheduler = make_scheduler(engine)
    scheduler.start()
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service:
        address = f"ws://127.0.0.1:{service.port}"
        with RemotePolicy(address, retry_policy=RetryPolicy(reply_s=1.0)) as policy:
            engine.gate.clear()
            with pytest.raises(ServingError) as late:
                policy.sample_actions(observation(value=1.0))
            assert late.value.code == "timeout"
            engine.gate.set()
            assert np.all(policy.sample_actions(observation(value=2.0)) == 2.0)


class CountingRobot:
    """Its state counts the actions; it notes what it was told."""

    def __init__(self, until: int) -> None:
        self.until, self.actions = until, []

    def observe(self) -> Mapping[str, Any]:
        return observation(value=0.1 * len(self.actions))

    def act(self, action: np.ndarray) -> bool:
        self.actions.append(float(action[0]))
        return len(self.actions) == self.until


def test_a_robot_acts_at_its_rate_while_chunks_are_computed() -> None:
    """A chunk is five ticks of 200 ms and takes half a tick: overlapped, hardly any is late.

    One after the other, every fifth tick would wait for its chunk and observations would be as old
    as a chunk is long.  The allowance is for a busy machine.
    """
    scheduler = make_scheduler(FakeEngine(seconds=0.1))
    scheduler.start()
    robot = CountingRobot(until=20)
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        blending = Blending(late="hold")
        started = time.monotonic()
        report = drive(robot, policy, rate_hz=5, ticks=100, ask_below=5, blending=blending)
        took = time.monotonic() - started
    summary = report.summary()
    assert report.finished and report.ticks == 20 and report.errors == {}
    assert took > 19 / 5 and report.chunks >= 4
    assert summary["late"] <= 5 and 90.0 < summary["age_ms_p50"] < 1000.0, summary


def test_a_robot_without_actions_stops_and_says_why() -> None:
    scheduler = make_scheduler(FakeEngine(seconds=0.5))
    scheduler.start()
    robot = CountingRobot(until=100)
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        report = drive(robot, policy, rate_hz=50, ticks=100, ask_below=1)
    assert not report.finished and report.ticks == 5 and "the robot stops" in str(report.stopped)


def test_a_robot_that_stops_does_not_wait_for_what_it_asked() -> None:
    """The server hangs on the second chunk: the loop ends at the tick without an action."""
    engine = FakeEngine()
    scheduler = make_scheduler(engine)
    scheduler.start()
    robot = CountingRobot(until=100)
    act = robot.act

    def hanging(action: np.ndarray) -> bool:
        engine.gate.clear()
        return act(action)

    robot.act = hanging
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        started = time.monotonic()
        report = drive(robot, policy, rate_hz=50, ticks=100, ask_below=3)
        took = time.monotonic() - started
        assert report.ticks == 5 and "tick 5" in str(report.stopped)
        assert took < 2.5, "half of the deadline, after which the request ends"
        engine.gate.set()
        assert np.all(policy.infer(observation(value=7.0))["actions"] == 7.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_robot_that_is_interrupted_leaves_nothing_behind(error: type[BaseException]) -> None:
    engine = FakeEngine()
    scheduler = make_scheduler(engine)
    scheduler.start()
    robot = CountingRobot(until=100)

    def failing(action: np.ndarray) -> bool:
        if len(robot.actions) == 3:
            raise error
        engine.gate.clear()
        robot.actions.append(float(action[0]))
        return False

    robot.act = failing
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        started = time.monotonic()
        with pytest.raises(error):
            drive(robot, policy, rate_hz=50, ticks=100, ask_below=4)
        assert time.monotonic() - started < 2.5
        engine.gate.set()
        assert np.all(policy.infer(observation(value=7.0))["actions"] == 7.0)


def test_a_drive_counts_ages_from_the_observation() -> None:
    """With a clock of its own, by which a chunk takes 30 s."""

    class Slow:
        def __init__(self) -> None:
            self.ages: list[float] = []

        def infer(self, observation: Mapping[str, Any], *, age_ms: float) -> dict[str, Any]:
            self.ages.append(age_ms)
            now[0] += 30.0
            return {"actions": chunk(0.0)}

        def abandon(self) -> None:
            raise AssertionError("nothing was on its way")

    now = [100.0]
    slow = Slow()
    robot = CountingRobot(until=3)
    observe = robot.observe

    def observing() -> Mapping[str, Any]:
        now[0] += 2.0  # the camera
        return observe()

    robot.observe = observing
    report = drive(
        robot, slow, rate_hz=1, ticks=3, ask_below=1, clock=lambda: now[0], sleep=lambda _: None
    )
    assert slow.ages == [2000.0] and report.ages_ms == [32_000.0] * 3


@pytest.mark.skipif(find_spec("metaworld") is None, reason="the simulator is an optional extra")
def test_closed_loop_success_through_the_socket_is_that_in_process(
    artifact: Path, serve_command: Any
) -> None:
    """Two episodes on the same seeds: every episode ends as it does without a socket."""
    from omega_qvla.errors import SimulatorUnavailable
    from omega_qvla.evaluation.rollout import rollout
    from omega_qvla.evaluation.simulators.pool import SimulatorPool

    server = serve_command(str(artifact), "--port", "0", "--limits", "none")
    port = server.wait_for("ready")["port"]
    tasks, seeds = ["drawer-open-v3"], range(2)
    with SimulatorPool(1) as pool, RemotePolicy(f"ws://127.0.0.1:{port}") as remote:
        adapted = WithoutExtras(remote)
        try:
            distant = rollout(adapted, tasks, seeds, pool=pool)
        except SimulatorUnavailable as error:
            pytest.skip(str(error))
        local = rollout(oq.load(artifact, threads=1), tasks, seeds, pool=pool)
    assert [(r.success, r.steps, r.chunks, r.jerk) for r in distant] == [
        (r.success, r.steps, r.chunks, r.jerk) for r in local
    ]
    assert any(record.success for record in local)


class WithoutExtras:
    """Sends exactly what the server's specification names."""

    def __init__(self, remote: RemotePolicy) -> None:
        self._remote, self.noise_shape = remote, remote.noise_shape

    def sample_actions(self, observation: Mapping[str, Any], noise: Any = None) -> np.ndarray:
        named = {key: observation[key] for key in ("images", "state", "prompt")}
        return self._remote.sample_actions(named, noise)
