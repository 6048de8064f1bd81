"""The server as robots meet it: openpi's published client, unmodified, and worse ones."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_serving import ARTIFACT, FakeEngine, Service, make_scheduler, observation, running

from omega_qvla.errors import PolicyError
from omega_qvla.serving.server.access import authorized, is_loopback, read_token, require_token
from omega_qvla.serving.server.scheduler import BatchingConfig, BatchScheduler
from omega_qvla.serving.wire import Bounds, decode_map, encode
from omega_qvla.serving.wire.specification import LAYOUTS, Specification

pytest.importorskip("websockets", reason="the extra serve is not installed")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from omega_qvla.serving.server.protocol_server import Listening
from omega_qvla.serving.server.protocols.openpi import OpenpiServer

pytestmark = pytest.mark.long

TOKEN = b"0123456789abcdef0123"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def scheduler(engine: FakeEngine) -> BatchScheduler:
    scheduler = make_scheduler(engine)
    scheduler.start()
    return scheduler


@pytest.fixture
def serve(scheduler: BatchScheduler) -> Iterator[Callable[..., Service]]:
    """Starts a server on the scheduler."""
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Service:
            server = OpenpiServer(scheduler, Listening(**options))
            return stack.enter_context(running(server))

        yield start


def openpi_client(port: int, **options: Any) -> Any:
    module = pytest.importorskip(
        "openpi_client.websocket_client_policy", reason="openpi-client is not installed"
    )
    return module.WebsocketClientPolicy("127.0.0.1", port, **options)


@contextlib.contextmanager
def plain_client(port: int, **options: Any) -> Any:
    """A connection past the metadata."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options) as client:
        client.recv()
        yield client


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def exchange(client: Any, message: bytes | str | list[Any]) -> dict[str, Any]:
    """One message and its answer; errors as their JSON."""
    client.send(message)
    answer = client.recv(10)
    return json.loads(answer) if isinstance(answer, str) else decode_map(answer)


def test_the_published_openpi_client_works_unchanged(serve: Callable[..., Service]) -> None:
    client = openpi_client(serve().port)
    told = client.get_server_metadata()
    assert told["artifact"] == ARTIFACT and told["specification"]["cameras"] == ["base", "wrist"]
    for value in (0.25, -0.5):
        reply = client.infer(observation(value=value))
        assert reply["actions"].shape == (5, 3) and reply["actions"].dtype == np.float32
        assert np.all(reply["actions"] == value)
        assert reply["artifact"] == ARTIFACT and reply["age_ms"] >= 0 and reply["request_id"]
    assert {"infer_ms", "prev_total_ms"} <= set(reply["server_timing"])


def test_the_published_client_gets_errors_and_is_served_again(
    serve: Callable[..., Service],
) -> None:
    client = openpi_client(serve().port)
    with pytest.raises(RuntimeError, match="unknown keys"):
        client.infer(observation(surprise=1))
    with pytest.raises(RuntimeError, match="never taught"):
        client.infer(observation("unknown word"))
    assert np.all(client.infer(observation())["actions"] == 0.5)


@pytest.mark.parametrize(
    ("layout", "keys"),
    [
        ("libero", {"observation/state": np.full(8, 0.5)}),
        (
            "droid",
            {
                "observation/joint_position": np.full(7, 0.5),
                "observation/gripper_position": np.full(1, 0.5),
            },
        ),
    ],
)
def test_openpis_own_observation_formats_are_read(layout: str, keys: dict[str, Any]) -> None:
    specification = Specification(
        ("base_0_rgb", "left_wrist_0_rgb"), 8, 5, 3, (5, 3), layout=LAYOUTS[layout]
    )
    scheduler = make_scheduler(specification=specification)
    scheduler.start()
    images = dict.fromkeys(LAYOUTS[layout].images, np.zeros((24, 24, 3), np.uint8))
    with running(OpenpiServer(scheduler, Listening())) as service:
        reply = openpi_client(service.port).infer({**images, **keys, "prompt": "press"})
    assert np.all(reply["actions"] == 0.5)
    with pytest.raises(PolicyError, match="`layout`"):
        Specification(("base", "wrist"), 8, 5, 3, (5, 3), layout=LAYOUTS[layout])


IMAGE = np.zeros((24, 32, 3), np.uint8)
BAD = [
    ({"images": {"base": IMAGE}}, "missing ['wrist']"),
    ({"images": {"base": IMAGE, "wrist": IMAGE, "left": IMAGE}}, "unknown ['left']"),
    ({"images": {"base": IMAGE, "wrist": IMAGE.astype(np.float32)}}, "float32 [24, 32, 3]"),
    ({"images": {"base": IMAGE, "wrist": IMAGE[..., :1]}}, "uint8 [24, 32, 1]"),
    ({"images": {"base": IMAGE, "wrist": IMAGE[:0]}}, "sides of 1 to 4096"),
    ({"images": {"base": IMAGE, "wrist": np.zeros((5000, 1, 3), np.uint8)}}, "[5000, 1, 3]"),
    ({"images": [IMAGE, IMAGE]}, "must map the cameras"),
    ({"images": ...}, "must map the cameras"),
    ({"images": {"base": IMAGE, "wrist": 1}}, "must be an array"),
    ({"image_masks": {"base": 1}}, "true or false"),
    ({"image_masks": {"left": True}}, "unknown cameras"),
    ({"image_masks": {"base": False, "wrist": False}}, "wrong cameras"),
    ({"state": ...}, "'state' is missing"),
    ({"state": np.zeros(5, np.float32)}, "must hold 4 numbers, found 5"),
    ({"state": np.zeros((2, 2), np.float32)}, "must be a vector"),
    ({"state": np.array([0, np.nan, 0, np.inf], np.float32)}, "NaN or Inf at [1, 3]"),
    ({"state": [1e300, 0, 0, 0]}, "NaN or Inf at [0]"),
    ({"state": "0 0 0 0"}, "must be numbers"),
    ({"state": [True, 0, 0, 0]}, "must be numbers"),
    ({"prompt": ...}, "must be a sentence"),
    ({"prompt": "  "}, "must be a sentence"),
    ({"prompt": 5}, "must be a sentence"),
    ({"prompt": "x" * 2001}, "2001 characters"),
    ({"noise": np.zeros((5, 4), np.float32)}, "'noise' must be float32 [5, 3]"),
    ({"noise": np.full((5, 3), np.nan, np.float32)}, "'noise' has NaN"),
    ({"deadline_ms": -1.0}, "'deadline_ms'"),
    ({"age_ms": float("nan")}, "'age_ms'"),
    ({"request_id": "x" * 65}, "'request_id'"),
    ({"request_id": [1]}, "'request_id'"),
    ({"embodiment": "unknown"}, "unknown keys ['embodiment']"),
]


def test_every_bad_observation_is_told_what_is_wrong_and_the_next_is_served(
    serve: Callable[..., Service],
) -> None:
    with plain_client(serve().port) as client:
        for changes, told in BAD:
            error = exchange(client, encode(observation(**changes)))
            assert error["error"] == "bad_request" and told in error["message"], error
            assert len(error["message"]) < 500
        assert "actions" in exchange(client, encode(observation()))


def test_bytes_that_are_no_message_get_an_error_and_the_next_is_served(
    serve: Callable[..., Service],
) -> None:
    with plain_client(serve().port) as client:
        for message in ("text", b"", b"\xc1", b"\xdd\xff\xff\xff\xff", encode([1])):
            assert exchange(client, message)["error"] == "malformed"
        error = exchange(client, encode(observation(request_id="a", surprise=1)))
        assert error["request_id"] == "a"
        assert "actions" in exchange(client, encode(observation()))


@pytest.mark.parametrize(
    ("prompt", "code"), [("memory", "out_of_memory"), ("bug", "internal"), ("nan", "unsafe_action")]
)
def test_trouble_inside_is_an_error_without_its_insides(
    serve: Callable[..., Service], prompt: str, code: str
) -> None:
    with plain_client(serve().port) as client:
        error = exchange(client, encode(observation(prompt)))
        assert error["error"] == code
        assert "Traceback" not in error["message"] and "secret" not in error["message"]
        assert "actions" in exchange(client, encode(observation()))


def test_a_failed_allocation_while_parsing_is_an_error_reply(
    serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> Any:
        raise MemoryError

    with plain_client(serve().port) as client:
        monkeypatch.setattr("omega_qvla.serving.server.protocols.openpi.parse_request", exhausted)
        assert exchange(client, encode(observation()))["error"] == "out_of_memory"
        monkeypatch.undo()
        assert "actions" in exchange(client, encode(observation()))


def test_a_message_over_the_limit_closes_that_connection_only(
    serve: Callable[..., Service],
) -> None:
    service = serve(bounds=Bounds(message_bytes=100_000))
    with plain_client(service.port) as client:
        client.send(bytes(100_001))
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    with plain_client(service.port) as client:
        assert "actions" in exchange(client, encode(observation()))


def test_replies_come_in_order_and_what_was_replaced_says_so(
    serve: Callable[..., Service], engine: FakeEngine
) -> None:
    service = serve()
    engine.gate.clear()
    with plain_client(service.port) as client:
        client.send(encode(observation(request_id=0)))
        assert engine.started.wait(5)
        for number in (1, 2, 3):
            client.send(encode(observation(request_id=number)))
        time.sleep(0.3)
        engine.gate.set()
        answers = [client.recv(5) for _ in range(4)]
    seen = [json.loads(a) if isinstance(a, str) else decode_map(a) for a in answers]
    assert [one["request_id"] for one in seen] == [0, 1, 2, 3]
    assert [one.get("error") for one in seen] == [None, "superseded", "superseded", None]


def test_a_client_gone_mid_request_leaves_the_server_in_service(
    serve: Callable[..., Service], engine: FakeEngine
) -> None:
    service = serve()
    engine.gate.clear()
    with plain_client(service.port) as leaving, plain_client(service.port) as waiting:
        leaving.send(encode(observation()))
        assert engine.started.wait(5)
        waiting.send(encode(observation()))
        leaving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaving.socket.close()
        engine.gate.set()
        assert not isinstance(waiting.recv(5), str)


def test_health_answers_while_the_policy_computes(
    serve: Callable[..., Service], engine: FakeEngine
) -> None:
    service = serve()
    engine.gate.clear()
    with plain_client(service.port) as client:
        client.send(encode(observation()))
        assert engine.started.wait(5)
        started = time.monotonic()
        assert get(service.port, "/healthz") == (200, "OK\n")
        assert time.monotonic() - started < 1.0
        engine.gate.set()
        client.recv(5)
    status, text = get(service.port, "/metrics")
    assert status == 200 and 'requests_total{outcome="answered"} 1' in text


def test_draining_finishes_refuses_and_ends(
    serve: Callable[..., Service], engine: FakeEngine, scheduler: BatchScheduler
) -> None:
    service = serve()
    engine.gate.clear()
    with plain_client(service.port) as first, plain_client(service.port) as second:
        first.send(encode(observation()))
        assert engine.started.wait(5)
        service.stop()
        deadline = time.monotonic() + 5
        while not scheduler.draining and time.monotonic() < deadline:
            time.sleep(0.01)
        assert exchange(second, encode(observation()))["error"] == "draining"
        assert get(service.port, "/healthz")[0] == 503
        with pytest.raises(InvalidStatus):
            connect(f"ws://127.0.0.1:{service.port}")
        started = time.monotonic()
        engine.gate.set()
        assert not isinstance(first.recv(5), str)
        with pytest.raises(ConnectionClosed) as closed:
            first.recv(5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
    service.join()
    assert time.monotonic() - started < 5.0


def test_a_token_is_needed_where_there_is_one(serve: Callable[..., Service]) -> None:
    port = serve(token=TOKEN).port
    client = openpi_client(port, api_key=TOKEN.decode())
    assert "actions" in client.infer(observation())
    for wrong in (None, TOKEN[:-1].decode(), "é" * 20):
        headers = {} if wrong is None else {"Authorization": f"Api-Key {wrong}"}
        with pytest.raises((InvalidStatus, UnicodeEncodeError)):
            connect(f"ws://127.0.0.1:{port}", additional_headers=headers)
    assert get(port, "/metrics")[0] == 401
    assert get(port, "/metrics", Authorization=f"Bearer {TOKEN.decode()}")[0] == 200
    assert get(port, "/healthz")[0] == 200


def test_a_page_in_a_browser_cannot_drive_the_robot(serve: Callable[..., Service]) -> None:
    port = serve().port
    with pytest.raises(InvalidStatus):
        connect(f"ws://127.0.0.1:{port}", origin="http://evil.example")


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.2", "robot.local")),
    ],
)
def test_only_loopback_needs_no_token(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone
    require_token(host, TOKEN)
    if not alone:
        with pytest.raises(PolicyError, match="`token_file`"):
            require_token(host, None)


def test_a_token_file_must_be_private_and_long(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(TOKEN + b"\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    for content, mode, told in (
        (TOKEN, 0o644, "chmod 600"),
        (b"short", 0o600, "at least 16"),
        (b"", 0o600, "at least 16"),
        ("é".encode() * 20, 0o600, "ASCII"),
    ):
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(PolicyError, match=told):
            read_token(file)
    with pytest.raises(PolicyError, match="cannot read"):
        read_token(tmp_path / "absent")


@pytest.mark.parametrize(
    ("header", "right"),
    [
        (f"Api-Key {TOKEN.decode()}", True),
        (f"bearer {TOKEN.decode()}", True),
        (f"Basic {TOKEN.decode()}", False),
        (TOKEN.decode(), False),
        ("Api-Key ", False),
        ("Api-Key é", False),
        (None, False),
    ],
)
def test_the_header_must_carry_the_token(header: str | None, right: bool) -> None:
    assert authorized(header, TOKEN) == right
    assert authorized(header, None)


def test_tls_protects_what_is_said(
    serve: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omega_qvla.serving.server.access import tls_context

    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    try:
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*command, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    port = serve(tls=tls_context(certificate, key)).port
    trusting = ssl.create_default_context(cafile=str(certificate))
    with connect(f"wss://localhost:{port}", ssl=trusting) as client:
        client.recv()
        assert "actions" in exchange(client, encode(observation()))
    with pytest.raises(PolicyError, match="cannot be used"):
        tls_context(certificate, certificate)


def test_silent_connections_give_way_to_a_robot(
    serve: Callable[..., Service], scheduler: BatchScheduler
) -> None:
    """Three times more half-open sockets than are kept: the oldest go, a good client is served."""
    service = serve(silent=20)
    sockets = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(60)]
    with plain_client(service.port) as client:
        assert "actions" in exchange(client, encode(observation()))
    deadline = time.monotonic() + 5
    for one in sockets:
        one.settimeout(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ConnectionError):
            assert one.recv(1) == b""
        one.close()
    assert scheduler.metrics.counted("connections_total", "silent") >= 40


HALF_A_MESSAGE = b"\x82\xfe\x7f\xff\x00\x00\x00\x00" + bytes(1000)
WHOLE_AND_HALF = b"\x82\x81\x00\x00\x00\x00\xc0" + HALF_A_MESSAGE
ENDLESS_FRAGMENTS = b"\x02\x81\x00\x00\x00\x00\x00" + b"\x00\x81\x00\x00\x00\x00\x00" * 20


@pytest.mark.parametrize("sent", [HALF_A_MESSAGE, WHOLE_AND_HALF, ENDLESS_FRAGMENTS])
def test_half_a_message_is_not_waited_for_wherever_the_segments_are_cut(
    serve: Callable[..., Service], sent: bytes
) -> None:
    """In one segment with the handshake, behind a whole message, and as fragments without end."""
    service = serve(ping_s=0.25)
    handshake = (
        b"GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", service.port), timeout=10) as slow,
        plain_client(service.port) as idle,
    ):
        slow.sendall(handshake + sent)
        with contextlib.suppress(ConnectionError):
            while slow.recv(4096):
                pass
        assert "actions" in exchange(idle, encode(observation()))


def test_messages_in_fragments_are_whole(serve: Callable[..., Service]) -> None:
    message = encode(observation())
    with plain_client(serve().port) as client:
        pieces = [message[at : at + 1000] for at in range(0, len(message), 1000)]
        assert "actions" in exchange(client, pieces)
        assert exchange(client, ["te", "xt"])["error"] == "malformed"


def test_a_flood_of_tiny_messages_is_answered_one_by_one_and_keeps_nobody_out(
    serve: Callable[..., Service],
) -> None:
    service = serve()
    with plain_client(service.port) as flood, plain_client(service.port) as good:
        flood.socket.sendall(b"\x82\x81\x00\x00\x00\x00\xc0" * 1000)
        assert "actions" in exchange(good, encode(observation()))
        answers = [json.loads(flood.recv(10)) for _ in range(1000)]
    assert {answer["error"] for answer in answers} == {"malformed"}


def test_a_robot_that_leaves_with_many_requests_on_their_way_leaves_nothing_behind(
    serve: Callable[..., Service], engine: FakeEngine, scheduler: BatchScheduler
) -> None:
    service = serve()
    engine.gate.clear()
    with plain_client(service.port) as leaving:
        for _ in range(12):
            leaving.send(encode(observation()))
        assert engine.started.wait(5)
        leaving.socket.close()
    engine.gate.set()
    deadline = time.monotonic() + 5
    while "omega_qvla_open_connections 0" not in scheduler.metrics.render():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert scheduler.waiting == 0
    with plain_client(service.port) as client:
        assert "actions" in exchange(client, encode(observation()))


def test_connections_have_a_bound(serve: Callable[..., Service]) -> None:
    service = serve(connections=2)
    with plain_client(service.port), plain_client(service.port):
        with pytest.raises(InvalidStatus) as refused:
            connect(f"ws://127.0.0.1:{service.port}")
        assert refused.value.response.status_code == 503
        assert get(service.port, "/healthz")[0] == 200
    time.sleep(0.2)
    with plain_client(service.port) as client:
        assert "actions" in exchange(client, encode(observation()))


def test_overload_is_refused_without_waiting_for_the_engine() -> None:
    """Sixteen clients at once on a server of one robot's size; the times are ``make soak``'s.

    One request runs and one waits.  A refusal that stood in that line would take as long as they.
    """
    scheduler = make_scheduler(
        FakeEngine(seconds=0.05), batching=BatchingConfig(batch=1, waiting=1, deadline_s=5.0)
    )
    scheduler.start()
    admitted: list[float] = []
    refused: list[float] = []
    until = time.monotonic() + 2.0

    def robot(port: int) -> None:
        with plain_client(port) as client:
            message = encode(observation())
            while time.monotonic() < until:
                started = time.monotonic()
                answer = exchange(client, message)
                took = time.monotonic() - started
                (admitted if "actions" in answer else refused).append(took)
                if "error" in answer:
                    assert answer["error"] == "overloaded"
                    time.sleep(0.02)

    with running(OpenpiServer(scheduler, Listening())) as service:
        robots = [threading.Thread(target=robot, args=(service.port,)) for _ in range(16)]
        for one in robots:
            one.start()
        assert get(service.port, "/healthz")[0] == 200
        for one in robots:
            one.join()
    assert admitted and len(refused) > len(admitted)
    assert np.median(refused) < np.median(admitted)


def test_a_thousand_requests_leave_no_descriptor_and_the_same_canary(
    serve: Callable[..., Service],
) -> None:
    service = serve()
    canary = encode(observation("noise", noise=np.full((5, 3), 0.25, np.float32)))
    with plain_client(service.port) as client:
        before = exchange(client, canary)["actions"]
        for _ in range(20):
            exchange(client, encode(observation()))
        descriptors = len(os.listdir("/proc/self/fd"))
        for round_ in range(10):
            with plain_client(service.port) as other:
                for _ in range(50):
                    exchange(client, encode(observation()))
                    exchange(other, encode(observation(value=0.1 * round_)))
        time.sleep(0.2)
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
        assert np.array_equal(exchange(client, canary)["actions"], before)
