"""What waits for its answer is bounded over all clients, and the newest of a client comes first."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_serving import FakeEngine, make_core, observation, running
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.serving.server.backlog import MESSAGE_BYTES, Backlog, Inbox, Message
from omega_qvla.serving.server.scheduler import Core, Rules
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

BODY = bytes(10_000)
SIZE = len(BODY) + MESSAGE_BYTES


def code(message: Any) -> str | None:
    return None if message.refusal is None else message.refusal.code


# --- the bookkeeping -------------------------------------------------------------------------


def test_a_message_counts_until_its_answer_is_known() -> None:
    backlog, inbox = Backlog(10 * SIZE), Inbox()
    backlog.put(inbox, BODY)
    message = backlog.take(inbox)
    assert message is not None and message.data == BODY and backlog.held == SIZE
    for _ in range(2):
        backlog.done(inbox, message)
        assert backlog.held == 0
    assert backlog.take(inbox) is None


def test_what_finds_no_room_is_refused_and_its_bytes_are_forgotten() -> None:
    backlog, first, second = Backlog(2 * SIZE), Inbox(), Inbox()
    kept = [backlog.put(first, BODY) for _ in range(2)]
    refused = backlog.put(second, BODY)
    assert code(refused) == "overloaded" and refused.data == b""
    assert f"{2 * SIZE} bytes" in str(refused.refusal)
    assert [code(one) for one in kept] == [None, None] and backlog.held == 2 * SIZE
    backlog.leave(first)
    assert backlog.held == 0 and code(backlog.put(second, BODY)) is None


def test_a_clients_unread_messages_make_room_for_its_newest() -> None:
    backlog, inbox, other = Backlog(3 * SIZE), Inbox(), Inbox()
    backlog.put(other, BODY)
    older = [backlog.put(inbox, BODY) for _ in range(2)]
    newest = backlog.put(inbox, BODY)
    assert [code(one) for one in (*older, newest)] == ["superseded", "superseded", None]
    assert backlog.held == 2 * SIZE and all(one.data == b"" for one in older)
    assert [backlog.take(inbox) for _ in range(3)] == [*older, newest], "the order stays"


def test_what_was_read_already_does_not_keep_a_clients_newest_out() -> None:
    backlog, inbox, other = Backlog(SIZE), Inbox(), Inbox()
    backlog.put(inbox, BODY)
    assert backlog.take(inbox) is not None
    assert code(backlog.put(inbox, BODY)) is None
    assert code(backlog.put(other, BODY)) == "overloaded"


def test_a_message_larger_than_everything_is_refused_and_replaces_nothing() -> None:
    backlog, inbox = Backlog(2 * SIZE), Inbox()
    older = backlog.put(inbox, BODY)
    assert code(backlog.put(inbox, bytes(2 * SIZE))) == "overloaded"
    assert code(older) is None


steps = st.tuples(
    st.integers(0, 3), st.sampled_from(["put", "take", "done", "leave"]), st.integers(0, 4000)
)


@given(st.lists(steps, max_size=60))
def test_the_sum_is_what_its_messages_hold_and_stays_bounded(taken: list[Any]) -> None:
    """Whatever clients do; ``read`` is what was taken and is not answered."""
    limit = 10_000
    backlog, inboxes = Backlog(limit), [Inbox() for _ in range(4)]
    read: list[list[Any]] = [[] for _ in inboxes]
    for client, step, size in taken:
        inbox, mine = inboxes[client], read[client]
        if step == "put":
            backlog.put(inbox, bytes(size))
        elif step == "take" and (message := backlog.take(inbox)):
            mine.append(message)
        elif step == "done" and mine:
            backlog.done(inbox, mine.pop())
        elif step == "leave":
            backlog.leave(inbox)
        waiting = {one for inbox in inboxes for one in (*inbox.unread, *inbox.counted)}
        held = sum(one.size for one in waiting if one.refusal is None)
        beyond = sum(one.size for messages in read for one in messages)
        assert backlog.held == held == sum(inbox.held for inbox in inboxes)
        assert backlog.held <= limit + beyond
        assert all(not one.data for one in waiting if one.refusal is not None)
    for inbox in inboxes:
        backlog.leave(inbox)
    assert backlog.held == 0


# --- the fronts ------------------------------------------------------------------------------


def gauge(core: Core, name: str) -> float:
    lines = core.metrics.render().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"omega_qvla_{name} "))


def large() -> dict[str, Any]:
    """An observation of 100 kB."""
    image = np.zeros((128, 128, 3), np.uint8)
    return observation(images={"base": image, "wrist": image})


@contextlib.contextmanager
def websocket_client(port: int) -> Iterator[Any]:
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as client:
        client.recv()
        yield client


def heard(client: Any) -> str:
    """The code of an answer, ``answered`` for actions."""
    answer = client.recv(20)
    return json.loads(answer)["error"] if isinstance(answer, str) else "answered"


def record_held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What a backlog holds after each message from now on: the sum rises nowhere else.

    The metric, read from a thread of the test, misses the moments between a full backlog and the
    message that makes its client's older ones give way.
    """
    put, held = Backlog.put, [0]

    def recorded(self: Backlog, inbox: Inbox, data: bytes) -> Message:
        message = put(self, inbox, data)
        held.append(self.held)
        return message

    monkeypatch.setattr(Backlog, "put", recorded)
    return held


def test_many_connections_hold_no_more_than_the_bound_and_all_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thirty robots send twelve large observations each while nothing is computed."""
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    from omega_qvla.serving.server.door import Listening
    from omega_qvla.serving.server.protocols.openpi import WebsocketFront

    robots, messages, limit = 30, 12, 1 << 20
    rules = Rules(batch=1, waiting=4, deadline_s=60.0)
    engine = FakeEngine()
    core = make_core(engine, rules=rules)
    core.start()
    message = encode(large())
    beyond = (rules.waiting + rules.batch) * (len(message) + MESSAGE_BYTES)
    told: list[list[str]] = []
    held = record_held(monkeypatch)

    def robot(port: int) -> None:
        with websocket_client(port) as client:
            for _ in range(messages):
                client.send(message)
            told.append([heard(client) for _ in range(messages)])

    engine.gate.clear()
    with running(WebsocketFront(core, Listening(port=0, waiting_bytes=limit))) as service:
        threads = [threading.Thread(target=robot, args=(service.port,)) for _ in range(robots)]
        for one in threads:
            one.start()
        until = time.monotonic() + 10.0
        while max(held) < limit - len(message) and time.monotonic() < until:
            time.sleep(0.01)
        engine.gate.set()
        for one in threads:
            one.join()
        assert limit - len(message) <= max(held) <= limit + beyond
        assert len(told) == robots and all(len(codes) == messages for codes in told)
        counted = Counter(code for codes in told for code in codes)
        assert dict(counted) == core.metrics.totals("requests_total")
        assert set(counted) == {"answered", "superseded", "overloaded"}
        assert gauge(core, "waiting_bytes") == 0
        with websocket_client(service.port) as client:
            client.send(message)
            assert heard(client) == "answered"


def test_a_full_backlog_is_told_and_the_newest_is_computed() -> None:
    """One robot's ten messages with room for three: unread ones make room, the last is answered."""
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    from omega_qvla.serving.server.door import Listening
    from omega_qvla.serving.server.protocols.openpi import WebsocketFront

    engine = FakeEngine()
    core = make_core(engine, rules=Rules(batch=1, waiting=1, deadline_s=60.0))
    core.start()
    message = encode(large())
    front = WebsocketFront(core, Listening(port=0, waiting_bytes=3 * (len(message) + 1000)))
    engine.gate.clear()
    with (
        running(front) as service,
        websocket_client(service.port) as client,
        websocket_client(service.port) as other,
    ):
        client.send(message)
        assert engine.started.wait(5)
        for _ in range(9):
            client.send(message)
        until = time.monotonic() + 5.0
        while gauge(core, "waiting_bytes") < 3 * len(message) and time.monotonic() < until:
            time.sleep(0.01)
        other.send(message)
        assert heard(other) == "overloaded"
        engine.gate.set()
        answers = [client.recv(20) for _ in range(10)]
        assert not isinstance(answers[0], str) and not isinstance(answers[-1], str)
        errors = [json.loads(answer) for answer in answers if isinstance(answer, str)]
        assert {error["error"] for error in errors} == {"superseded"}
        assert any("before this one was read" in error["message"] for error in errors)
        assert gauge(core, "waiting_bytes") == 0


def test_a_robot_that_leaves_takes_its_messages_with_it() -> None:
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    from omega_qvla.serving.server.door import Listening
    from omega_qvla.serving.server.protocols.openpi import WebsocketFront

    engine = FakeEngine()
    core = make_core(engine)
    core.start()
    engine.gate.clear()
    with running(WebsocketFront(core, Listening(port=0))) as service:
        with websocket_client(service.port) as client:
            for _ in range(8):
                client.send(encode(large()))
            assert engine.started.wait(5)
            assert gauge(core, "waiting_bytes") > 0
            client.socket.close()
        until = time.monotonic() + 5.0
        while gauge(core, "waiting_bytes") and time.monotonic() < until:
            time.sleep(0.01)
        assert gauge(core, "waiting_bytes") == 0
        engine.gate.set()


def test_messages_in_fragments_are_whole_and_a_flood_of_tiny_ones_ends_its_connection() -> None:
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    from websockets.exceptions import ConnectionClosed

    from omega_qvla.serving.server.door import Listening
    from omega_qvla.serving.server.protocols.openpi import WebsocketFront

    core = make_core()
    core.start()
    message = encode(observation())
    pieces = [message[at : at + 1000] for at in range(0, len(message), 1000)]
    with running(WebsocketFront(core, Listening(port=0))) as service:
        with websocket_client(service.port) as client:
            client.send(pieces)
            assert heard(client) == "answered"
            client.send(["te", "xt"])
            assert heard(client) == "malformed"
        with websocket_client(service.port) as flood, websocket_client(service.port) as good:
            flood.socket.sendall(b"\x82\x81\x00\x00\x00\x00\xc0" * 1000)
            with pytest.raises(ConnectionClosed):
                while True:
                    flood.recv(5)
            good.send(message)
            assert heard(good) == "answered"
    assert core.metrics.counted("connections_total", "unread_messages") == 1


def test_groots_robots_share_the_bound_too() -> None:
    zmq = pytest.importorskip("zmq", reason="the extra serve is not installed")
    from omega_qvla.serving.server.protocols.gr00t import Gr00tFront

    images = {f"video.{name}": np.zeros((1, 24, 32, 3), np.uint8) for name in ("base", "wrist")}
    state = {"state.arm": np.zeros((1, 3)), "state.gripper": np.zeros((1, 1))}
    data = {**images, **state, "annotation.task": ["press"]}
    message = encode({"endpoint": "get_action", "data": data}, gr00t_array)
    ping = encode({"endpoint": "ping"})
    engine = FakeEngine()
    core = make_core(engine)
    core.start()
    engine.gate.clear()
    limit = len(message) + 2 * MESSAGE_BYTES + len(ping)
    with (
        running(Gr00tFront(core, port=0, waiting_bytes=limit)) as service,
        zmq.Context() as context,
        context.socket(zmq.REQ) as first,
        context.socket(zmq.REQ) as second,
    ):
        for socket in (first, second):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 5000)
            socket.connect(f"tcp://127.0.0.1:{service.port}")
        first.send(message)
        assert engine.started.wait(5)
        second.send(message)
        answer = decode_map(second.recv())
        assert answer["code"] == "overloaded" and "bytes" in answer["error"]
        second.send(ping)
        assert decode_map(second.recv())["status"] == "ok"
        engine.gate.set()
        assert "action.arm" in decode_map(first.recv())
        second.send(message)
        assert "action.arm" in decode_map(second.recv())
        assert gauge(core, "waiting_bytes") == 0
    assert core.metrics.counted("requests_total", "overloaded") == 1
