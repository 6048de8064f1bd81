"""GR00T's protocol: what N1.5's client sends and expects, and what nobody should send."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_serving import ARTIFACT, FakeEngine, make_core, running
from pydantic import BaseModel, ConfigDict

from omega_qvla.errors import PolicyError
from omega_qvla.serving.server.protocol_server import metadata
from omega_qvla.serving.server.scheduler import Core
from omega_qvla.serving.wire import Bounds

zmq = pytest.importorskip("zmq", reason="the extra serve is not installed")
msgpack = pytest.importorskip("msgpack", reason="the client's serializer is in the dev extra")

from omega_qvla.serving.server.protocols.gr00t import Gr00tFront  # noqa: E402 - needs what is checked above


def pack(value: Any) -> bytes:
    """As N1.5's client serializes: arrays are .npy files."""

    def array(one: Any) -> Any:
        file = io.BytesIO()
        np.save(file, one, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    return msgpack.packb(value, default=array)


class ModalityConfig(BaseModel):
    """The fields of N1.5's class of that name, and no others."""

    model_config = ConfigDict(extra="forbid")

    delta_indices: list[int]
    modality_keys: list[str]


def unpack(data: bytes) -> Any:
    def restore(one: Any) -> Any:
        if "__ModalityConfig_class__" in one:
            return ModalityConfig(**json.loads(one["as_json"]))
        if "__ndarray_class__" in one:
            return np.load(io.BytesIO(one["as_npy"]), allow_pickle=False)
        return one

    return msgpack.unpackb(data, object_hook=restore)


@contextlib.contextmanager
def connected(port: int, kind: int) -> Iterator[Any]:
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(f"tcp://127.0.0.1:{port}")
        yield socket


@pytest.fixture
def core() -> Core:
    core = make_core(FakeEngine())
    core.start()
    return core


@pytest.fixture
def client(core: Core) -> Iterator[Any]:
    front = Gr00tFront(core, port=0, bounds=Bounds(message_bytes=1 << 20))
    with running(front) as service, connected(service.port, zmq.REQ) as socket:
        yield socket


def call(client: Any, request: Any) -> Any:
    client.send(request if isinstance(request, bytes) else pack(request))
    return unpack(client.recv())


def observation(**changes: Any) -> dict[str, Any]:
    data = {
        "video.base": np.zeros((1, 24, 32, 3), np.uint8),
        "video.wrist": np.zeros((1, 24, 32, 3), np.uint8),
        "state.arm": np.full((1, 3), 0.5),
        "state.gripper": np.full((1, 1), 0.5),
        "annotation.human.action.task_description": ["press"],
    }
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**data, **changes}.items() if value is not ...}


def test_ping_and_get_action_answer_as_the_client_expects(client: Any) -> None:
    pong = call(client, {"endpoint": "ping"})
    assert (pong["status"], pong["message"]) == ("ok", "Server is running")
    actions = call(client, {"endpoint": "get_action", "data": observation()})
    assert set(actions) == {"action.arm", "action.gripper"}
    assert actions["action.arm"].shape == (5, 2) and actions["action.arm"].dtype == np.float32
    assert np.all(actions["action.gripper"] == 0.5)


def test_ping_tells_the_metadata_that_the_websocket_sends_first(core: Core, client: Any) -> None:
    told = call(client, {"endpoint": "ping"})["metadata"]
    assert told == metadata(core) and told["artifact"] == ARTIFACT
    assert told["specification"]["state_parts"] == [["arm", 3], ["gripper", 1]]


def test_who_asks_is_told_artifact_request_and_age(client: Any) -> None:
    """All of it in the observation: the published client lets a robot fill nothing else."""
    data = observation(meta=True, request_id="grasp-7", age_ms=40.0)
    answer = call(client, {"endpoint": "get_action", "data": data})
    assert answer["meta"]["artifact"] == ARTIFACT and answer["meta"]["request_id"] == "grasp-7"
    assert answer["meta"]["age_ms"] >= 40.0 and answer["meta"]["batch"] == 1
    silent = call(client, {"endpoint": "get_action", "data": {**data, "meta": False}})
    assert set(silent) == {"action.arm", "action.gripper"}


def test_a_robot_that_asks_for_the_modalities_can_send_what_they_say(client: Any) -> None:
    told = call(client, {"endpoint": "get_modality_config"})
    assert set(told) == {"video", "state", "action", "language"}
    assert all(told[name].delta_indices == [0] for name in ("video", "state", "language"))
    assert told["state"].modality_keys == ["state.arm", "state.gripper"]
    known = observation()
    keys = [key for name in ("video", "state", "language") for key in told[name].modality_keys]
    data = {key: known[key] for key in keys}
    actions = call(client, {"endpoint": "get_action", "data": data})
    assert list(actions) == told["action"].modality_keys
    assert told["action"].delta_indices == list(range(len(actions["action.arm"])))


def test_the_same_noise_gives_the_same_actions(client: Any) -> None:
    noise = np.linspace(-1.0, 1.0, 15, dtype=np.float32).reshape(5, 3)
    changes = {"annotation__human.action.task_description": ["noise"], "noise": noise}
    actions = call(client, {"endpoint": "get_action", "data": observation(**changes)})
    assert np.array_equal(actions["action.arm"], noise[:, :2] + 0.5)


def test_an_observation_past_its_deadline_is_a_named_error(client: Any) -> None:
    data = observation(age_ms=80.0, deadline_ms=50.0, request_id=3)
    answer = call(client, {"endpoint": "get_action", "data": data})
    assert answer["code"] == "stale" and answer["request_id"] == 3
    assert "action.arm" in call(client, {"endpoint": "get_action", "data": observation()})


def test_draining_finishes_refuses_and_says_so() -> None:
    engine = FakeEngine()
    core = make_core(engine)
    core.start()
    engine.gate.clear()
    front = Gr00tFront(core, port=0)
    with (
        running(front) as service,
        connected(service.port, zmq.REQ) as early,
        connected(service.port, zmq.REQ) as late,
    ):
        early.send(pack({"endpoint": "get_action", "data": observation()}))
        assert engine.started.wait(5)
        service.stop()
        while not core.draining:
            time.sleep(0.01)
        assert call(late, {"endpoint": "ping"})["status"] == "draining"
        refused = call(late, {"endpoint": "get_action", "data": observation()})
        assert refused["code"] == "draining"
        engine.gate.set()
        assert "action.arm" in unpack(early.recv())


def test_nobody_can_end_the_server(client: Any) -> None:
    for endpoint in ("kill", "load", "reset", None, 3, "x" * 9000):
        answer = call(client, {"endpoint": endpoint})
        assert answer["code"] == "bad_request" and len(answer["error"]) < 300
        assert "N1.5, and here are ping, get_action, get_modality_config" in answer["error"]
    assert call(client, {"endpoint": "ping"})["status"] == "ok"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"video__wrist": ...}, "missing ['wrist']"),
        ({"video__left": np.zeros((1, 4, 4, 3), np.uint8)}, "unknown ['left']"),
        ({"video__base": np.zeros((2, 24, 32, 3), np.uint8)}, "2 time steps"),
        ({"video__base": np.zeros((1, 24, 32, 3), np.float32)}, "float32"),
        ({"state__arm": ...}, "the policy needs ['arm', 'gripper']"),
        ({"state__leg": np.zeros((1, 2))}, "the policy needs"),
        ({"state__arm": np.zeros((1, 4))}, "shape [1, 3]"),
        ({"state__arm": np.full((1, 3), np.nan)}, "NaN or Inf"),
        ({"state__arm": [0.0, 0.0, 0.0]}, "must be an array"),
        ({"annotation__human.action.task_description": ...}, "found 0"),
        ({"annotation__human.action.task_description": ["a", "b"]}, "must be a sentence"),
        ({"annotation__other": ["press"]}, "found 2"),
        ({"surprise": 1}, "unknown key"),
        ({"meta": 1}, "true or false"),
        ({"request_id": [1]}, "'request_id'"),
        ({"deadline_ms": -1.0}, "'deadline_ms'"),
        ({"noise": np.zeros((5, 4), np.float32)}, "'noise'"),
    ],
)
def test_a_bad_observation_is_told_what_is_wrong_and_the_next_is_served(
    client: Any, changes: dict[str, Any], told: str
) -> None:
    answer = call(client, {"endpoint": "get_action", "data": observation(**changes)})
    assert answer["code"] == "bad_request" and told in answer["error"]
    assert "action.arm" in call(client, {"endpoint": "get_action", "data": observation()})


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x91" * 50, b"\x00", pack([1])])
def test_bytes_that_are_no_message_get_an_error(client: Any, message: bytes) -> None:
    assert call(client, message)["code"] == "malformed"
    assert call(client, {"endpoint": "ping"})["status"] == "ok"


def test_a_message_over_the_limit_ends_that_connection_only(client: Any) -> None:
    client.setsockopt(zmq.RCVTIMEO, 500)
    client.send(bytes((1 << 20) + 1))
    with pytest.raises(zmq.error.Again):
        client.recv()
    port = int(client.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    with connected(port, zmq.REQ) as other:
        assert call(other, {"endpoint": "ping"})["status"] == "ok"


def test_an_envelope_of_another_kind_of_socket_is_ignored(core: Core) -> None:
    front = Gr00tFront(core, port=0)
    with running(front) as service, connected(service.port, zmq.DEALER) as dealer:
        dealer.send_multipart([b"x"] * 20)
        dealer.send_multipart([b"", pack({"endpoint": "ping"})])
        assert unpack(dealer.recv_multipart()[1])["status"] == "ok"


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "10.0.0.1"])
def test_it_listens_on_loopback_only(core: Core, host: str) -> None:
    with pytest.raises(PolicyError, match="ssh -L"):
        Gr00tFront(core, host)
