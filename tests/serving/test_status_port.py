"""Health and metrics beside GR00T's server: the answers of openpi's own port."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.errors import PolicyError
from omega_qvla.serving.server.service import Service, Settings
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

pytest.importorskip("websockets", reason="the extra serve is not installed")
zmq = pytest.importorskip("zmq", reason="the extra serve is not installed")

TOKEN = "0123456789abcdef0123"


class Running:
    """A service in a thread of its own, and what it logged."""

    def __init__(self, artifact: Path, settings: Settings) -> None:
        self.events: list[dict[str, Any]] = []
        self.service = Service.build(artifact, settings, self._log)
        self._ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _log(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    async def _serve(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        await self.service.server.serve(self._stop, self._listening)

    def _listening(self, port: int) -> None:
        self.port = port
        self._ready.set()

    @property
    def status_port(self) -> int:
        (told,) = [event["port"] for event in self.events if event["event"] == "status"]
        return told

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.status_port, timeout=5)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def stop(self) -> None:
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        self._thread.join(15)
        assert not self._thread.is_alive()


@contextmanager
def serving(artifact: Path, **settings: Any) -> Iterator[Running]:
    running = Running(artifact, Settings("gr00t", port=0, metrics_port=0, seed=0, **settings))
    try:
        yield running
    finally:
        running.stop()
        running.join()


def ask(port: int) -> dict[str, Any]:
    first = oq.Observations.load("builtin:tiny-pi05")[0]
    data = {f"video.{name}": image[None] for name, image in first["images"].items()}
    data |= {"state.state": np.asarray(first["state"], np.float32)[None]}
    data |= {"annotation.task": [first["prompt"]]}
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.RCVTIMEO, 20000)
        asking.connect(f"tcp://127.0.0.1:{port}")
        asking.send(encode({"endpoint": "get_action", "data": data}, gr00t_array))
        return decode_map(asking.recv())


def test_health_and_metrics_of_gr00ts_server_are_on_a_port_of_their_own(artifact: Path) -> None:
    with serving(artifact) as running:
        assert running.get("/healthz") == (200, "OK\n")
        assert "action.action" in ask(running.port)
        status, text = running.get("/metrics")
        assert status == 200 and text == running.service.scheduler.metrics.render()
        assert 'omega_qvla_requests_total{outcome="answered"} 1' in text
        assert running.get("/")[0] == 404


def test_a_drain_is_told_until_the_end(artifact: Path) -> None:
    """The port outlives the server that drains: a probe hears 503, not silence."""
    with serving(artifact) as running:
        scheduler, heard = running.service.scheduler, []
        ended = scheduler.drain

        def watched(seconds: float) -> bool:
            finished = ended(seconds)
            heard.append(running.get("/healthz"))  # from the thread that drains; the loop answers
            return finished

        scheduler.drain = watched  # type: ignore[method-assign]
        running.stop()
        running.join()
    assert heard == [(503, "draining\n")]


def test_nothing_becomes_a_websocket_there(artifact: Path) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    with (
        serving(artifact) as running,
        pytest.raises(InvalidStatus),
        connect(f"ws://127.0.0.1:{running.status_port}"),
    ):
        pass


def test_silent_connections_give_way_there_too(artifact: Path) -> None:
    with serving(artifact) as running:
        address = ("127.0.0.1", running.status_port)
        opened = [socket.create_connection(address) for _ in range(100)]
        assert running.get("/healthz")[0] == 200
        counts = running.service.scheduler.metrics
        end = time.monotonic() + 5
        while counts.counted("connections_total", "silent") < 36 and time.monotonic() < end:
            time.sleep(0.01)
        assert counts.counted("connections_total", "silent") >= 36
        for one in opened:
            one.close()


def test_a_token_protects_the_metrics_and_not_the_health(artifact: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    with serving(artifact, token_file=token, metrics_host="0.0.0.0") as running:
        assert running.get("/healthz")[0] == 200
        assert running.get("/metrics")[0] == running.get("/")[0] == 401
        assert running.get("/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
        counts = running.service.scheduler.metrics
        assert counts.counted("connections_total", "unauthorized") == 2
        assert any("unencrypted" in event.get("message", "") for event in running.events)


def test_other_machines_need_a_token_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = Settings("gr00t", metrics_port=0, metrics_host="0.0.0.0")
    with pytest.raises(PolicyError, match="`token_file`"):
        Service.build(tmp_path / "absent", settings, lambda event, **fields: None)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"protocol": "openpi", "metrics_port": 9000}, "on its own port"),
        ({"protocol": "gr00t", "metrics_port": 70000}, "`metrics_port=70000`"),
        ({"protocol": "gr00t", "metrics_host": "0.0.0.0"}, "needs a `metrics_port`"),
        ({"protocol": "gr00t", "token_file": Path("token")}, "SSH tunnel"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        Settings(**settings)


def test_a_status_port_that_is_taken_is_an_error(artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings("gr00t", port=0, metrics_port=taken.getsockname()[1])
        service = Service.build(artifact, settings, lambda event, **fields: None)
        with pytest.raises(OSError, match="in use"):
            asyncio.run(service.server.serve(asyncio.Event(), lambda port: None))
