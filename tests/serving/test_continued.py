"""Real-time chunking through a server: the robot brings what is left over of its last chunk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from fake_serving import (
    SPECIFICATION,
    FakeEngine,
    ask,
    code_of,
    make_scheduler,
    observation,
    running,
)
from scripted_server import scripted

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.policies.native import NativePolicy
from omega_qvla.real_time_chunking import LeftOver, RealTimeChunking
from omega_qvla.serving.client.action_queue import ActionQueue, Blending
from omega_qvla.serving.server.policy_engine import PolicyEngine
from omega_qvla.serving.server.service import Settings
from omega_qvla.serving.wire.specification import parse_request

pytest.importorskip("websockets", reason="the extra serve is not installed")

from omega_qvla.serving.client import RemotePolicy, drive
from omega_qvla.serving.server.protocol_server import Listening
from omega_qvla.serving.server.protocols.openpi import OpenpiServer

LEFT = np.arange(6, dtype=np.float32).reshape(2, 3)


# --- the request -----------------------------------------------------------------------------


def test_a_request_brings_the_left_over_and_the_delay() -> None:
    request = parse_request(observation(previous=LEFT, delay=1), SPECIFICATION)
    assert request.left_over is not None and request.left_over.delay == 1
    assert np.array_equal(request.left_over.actions, LEFT)
    assert parse_request(observation(), SPECIFICATION).left_over is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"previous": LEFT}, "previous without delay"),
        ({"delay": 1}, "without previous"),
        ({"previous": LEFT, "delay": 3}, "only 2 actions"),
        ({"previous": LEFT, "delay": -1}, "0 or more"),
        ({"previous": LEFT, "delay": 0.5}, "whole number"),
        ({"previous": LEFT, "delay": True}, "whole number"),
        ({"previous": LEFT.tolist(), "delay": 0}, "float32"),
        ({"previous": LEFT.astype(np.float64), "delay": 0}, "float32"),
        ({"previous": LEFT[:, :2], "delay": 0}, r"at most 5, 3.*\[2, 2\]"),
        ({"previous": np.zeros((6, 3), np.float32), "delay": 0}, r"\[6, 3\]"),
        ({"previous": LEFT[:0], "delay": 0}, r"\[0, 3\]"),
        ({"previous": LEFT * np.float32("nan"), "delay": 0}, "NaN or Inf"),
    ],
)
def test_a_left_over_that_cannot_be_is_a_bad_request(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ServingError, match=named) as refused:
        parse_request(observation(**changes), SPECIFICATION)
    assert refused.value.code == "bad_request"


def test_gr00ts_protocol_brings_them_in_the_observation() -> None:
    pytest.importorskip("zmq", reason="the extra serve is not installed")
    from omega_qvla.serving.server.protocols.gr00t import parse_observation

    data = {f"video.{name}": image for name, image in observation()["images"].items()}
    data |= {"state.arm": np.zeros((1, 3)), "state.gripper": np.zeros((1, 1))}
    data |= {"annotation.task": ["press"], "previous": LEFT, "delay": 2}
    request = parse_observation(data, SPECIFICATION)
    assert request.left_over is not None and request.left_over.delay == 2


def test_robots_in_one_batch_continue_their_own_chunks() -> None:
    scheduler = make_scheduler(FakeEngine())
    scheduler.start()
    continued = ask(scheduler, previous=LEFT, delay=2)
    assert np.array_equal(continued.actions[:2], LEFT + 2)
    assert np.all(ask(scheduler, "other").actions == 0.5)
    assert np.all(ask(scheduler).actions == 0.5), "the server keeps nothing of a robot"


def test_a_served_policy_continues_as_it_does_in_process(
    small_policy: NativePolicy, few: Observations
) -> None:
    settings = RealTimeChunking(execution_horizon=2, max_guidance_weight=3.0, schedule="exp")
    noise = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    before = small_policy.sample_actions(few[0], -noise)[1:]
    engine = PolicyEngine(small_policy, chunking=settings)
    (served,) = engine.sample([engine.encode(few[1], LeftOver(before, 1))], [noise])
    alone = small_policy.sample_actions(few[1], noise, previous=before, delay=1, chunking=settings)
    assert np.array_equal(served, alone)


@pytest.mark.parametrize(
    "option",
    [{"execution_horizon": 0}, {"max_guidance_weight": -1.0}, {"guidance_schedule": "half"}],
)
def test_serve_refuses_settings_that_cannot_be(option: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        Settings(**option)


# --- the client ------------------------------------------------------------------------------


def test_a_remote_policy_sends_what_is_left_over() -> None:
    scheduler = make_scheduler(FakeEngine())
    scheduler.start()
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        for chunk in (
            policy.sample_actions(observation(), previous=LEFT.astype(np.float64), delay=1),
            policy.infer({**observation(), "previous": LEFT, "delay": 1})["actions"],
        ):
            assert np.array_equal(chunk[:2], LEFT + 1) and np.all(chunk[2:] == 0.5)
        with pytest.raises(ServingError, match="without delay") as refused:
            policy.infer(observation(), previous=LEFT)
        assert code_of(refused.value) == "bad_request" and policy.reconnections == 0


def test_a_server_that_does_not_know_left_overs_is_not_sent_any() -> None:
    """openpi's own: it would take them for something of the observation."""
    with (
        scripted(names=False) as server,
        RemotePolicy(server.address) as policy,
        pytest.raises(ServingError, match="does not say that it takes previous"),
    ):
        policy.infer(observation(), previous=LEFT, delay=1)


# --- the queue -------------------------------------------------------------------------------


def counting(first: float, length: int = 8) -> np.ndarray:
    return np.repeat(first + np.arange(length, dtype=np.float32)[:, None], 2, axis=1)


def test_a_queue_knows_what_is_left_over_and_how_long_chunks_take() -> None:
    queue = ActionQueue(Blending(ticks=1, continued=True))
    assert queue.left_over(0) is None and queue.to_continue(0) is None
    queue.merge(counting(0.0), 0, 0)
    queue.merge(counting(13.0), 3, 5)
    left = queue.to_continue(6)
    assert left is not None and left.delay == 2
    # Blended at tick 5 alone; what is sent is what will be carried out.
    assert np.array_equal(left.actions, counting(16.0, 5))
    assert queue.expected_delay == 2 and queue.delays == [0, 2]
    assert ActionQueue(Blending()).to_continue(0) is None


def test_a_slower_server_is_asked_earlier_and_never_for_more_than_is_left() -> None:
    queue = ActionQueue(Blending(continued=True))
    queue.merge(counting(0.0), 0, 0)
    assert not queue.due(0, 3) and queue.due(6, 3)
    queue.merge(counting(0.0), 1, 6)  # five ticks
    assert queue.due(3, 3), "six actions are left, and the answer takes five ticks"
    late = queue.to_continue(7)
    assert late is not None and late.delay == len(late.actions) == 2
    plain = ActionQueue(Blending())
    plain.merge(counting(0.0), 1, 6)
    assert not plain.due(6, 3)


class LateServer:
    """Answers three ticks after it is asked, by the clock of the loop that asks."""

    def __init__(self, failing: frozenset[int] = frozenset()) -> None:
        self.now, self.asked, self._failing = 0.0, [], failing
        self._due: list[tuple[float, threading.Event]] = []

    def infer(self, observation: Mapping[str, Any], *, age_ms: float, **left: Any) -> Any:
        number = len(self.asked)
        self.asked.append(left)
        if number == 0:
            self.now += 3.0
        else:
            there = threading.Event()
            self._due.append((self.now + 3.0, there))
            assert there.wait(20)
        if number in self._failing:
            raise ServingError("stale", "too late")
        return {"actions": counting(100.0 * number)}

    def abandon(self) -> None:
        for _, there in self._due:
            there.set()

    def sleep(self, seconds: float) -> None:
        """A tick: what is due by then is there."""
        self.now += seconds
        while _asking() and all(there.is_set() for _, there in self._due):
            threading.Event().wait(0.001)  # it has not come here yet
        for when, there in self._due:
            if when <= self.now + 1e-6 and not there.is_set():
                there.set()
                for thread in _asking():
                    thread.join(20)


def _asking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "policy"]


class Still:
    """A robot that only notes what it was told."""

    def __init__(self) -> None:
        self.actions: list[float] = []

    def observe(self) -> Mapping[str, Any]:
        return observation()

    def act(self, action: np.ndarray) -> bool:
        self.actions.append(float(action[0]))
        return False


def test_a_drive_measures_the_delay_asks_ahead_and_sends_what_is_left_over() -> None:
    """Chunks of eight, three ticks late: asked at ticks 4 and 8, there at 7 and 11."""
    server, robot = LateServer(), Still()
    blending = Blending(ticks=0, continued=True)
    report = drive(
        robot,
        server,
        rate_hz=1,
        ticks=12,
        ask_below=2,
        blending=blending,
        clock=lambda: server.now,
        sleep=server.sleep,
    )
    assert server.asked[0] == {}
    for asked, expected in zip(
        server.asked[1:3], (counting(4.0, 4), counting(104.0, 4)), strict=True
    ):
        assert asked["delay"] == 3 and np.array_equal(asked["previous"], expected)
    assert robot.actions == [*range(7), *range(103, 107), 203]
    assert report.delays == [3, 3, 3] and report.summary()["delay_ticks_p50"] == 3.0
    assert report.late == 0


def test_after_a_lost_chunk_the_next_one_continues_what_the_robot_really_does() -> None:
    """The server computed it, but its actions never came: they are no part of the left-over."""
    server, robot = LateServer(frozenset({1})), Still()
    blending = Blending(ticks=0, late="hold", hold_action=(-1.0, -1.0), continued=True)
    report = drive(
        robot,
        server,
        rate_hz=1,
        ticks=11,
        ask_below=2,
        blending=blending,
        clock=lambda: server.now,
        sleep=server.sleep,
    )
    assert report.errors == {"stale": 1}
    assert server.asked[2]["delay"] == 1 and np.array_equal(
        server.asked[2]["previous"], counting(7.0, 1)
    )
    assert robot.actions == [*range(8), -1.0, -1.0, 203]


class Noting(FakeEngine):
    """Notes what its chunks were to continue."""

    def __init__(self) -> None:
        super().__init__()
        self.continued: list[Any] = []

    def encode(self, observation: Mapping[str, Any], left_over: Any = None) -> Any:
        self.continued.append(left_over)
        return super().encode(observation, left_over)


def test_a_robot_and_a_server_continue_chunks_over_the_socket() -> None:
    engine, robot = Noting(), Still()
    scheduler = make_scheduler(engine)
    scheduler.start()
    blending = Blending(ticks=0, late="hold", continued=True)
    server = OpenpiServer(scheduler, Listening())
    with running(server) as service, RemotePolicy(f"ws://127.0.0.1:{service.port}") as policy:
        report = drive(robot, policy, rate_hz=20, ticks=12, ask_below=4, blending=blending)
    assert report.errors == {} and engine.continued[0] is None
    left_overs = [left for left in engine.continued if left is not None]
    assert left_overs and all(left.delay <= len(left.actions) <= 5 for left in left_overs)
