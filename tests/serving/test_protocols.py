"""A protocol is a file and a line: one of a test's own is served like those that are there."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_serving import running

import omega_qvla as oq
from omega_qvla.errors import PolicyError

pytest.importorskip("websockets", reason="the extra serve is not installed")

from omega_qvla.serving.server.protocols import PROTOCOLS, ServingProtocol
from omega_qvla.serving.server.service import Service, Settings

LINES = ServingProtocol("lines_protocol:LinesServer", 7000, "asyncio", http=False, layouts=True)


def events_of(log: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in log]


def test_a_protocol_of_one_file_and_one_line_is_served(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded, warmed up, checked, batched and drained as every other; the same actions."""
    monkeypatch.setitem(PROTOCOLS, "lines", LINES)
    log: list[dict[str, Any]] = []
    service = Service.build(
        artifact,
        Settings("lines", port=0, limits="none", deadline_ms=60_000.0),
        lambda event, **fields: log.append({"event": event, **fields}),
    )
    policy = oq.load(artifact, threads=1)
    noise = np.zeros(policy.noise_shape, np.float32)
    first = oq.Observations.load("builtin:tiny-pi05")[0]
    message = {
        "images": {name: image.tolist() for name, image in first["images"].items()},
        "state": first["state"].tolist(),
        "prompt": first["prompt"],
        "request_id": "one",
    }
    with (
        running(service.server) as served,
        socket.create_connection(("127.0.0.1", served.port)) as robot,
        robot.makefile("rwb") as lines,
    ):
        for sent in (message, {**message, "surprise": 1}, {**message, "state": [1.0]}):
            lines.write(json.dumps(sent).encode() + b"\n")
        lines.flush()
        reply, *errors = (json.loads(lines.readline()) for _ in range(3))
    assert np.shape(reply["actions"]) == policy.sample_actions(first, noise).shape
    assert (reply["request_id"], reply["artifact"]) == ("one", policy.content_hash)
    assert [one["error"] for one in errors] == ["bad_request"] * 2
    assert events_of(log) == ["loaded", "warm", "draining", "drained"]
    assert service.totals()["requests"] == {"answered": 1, "bad_request": 2}


def test_a_protocol_without_http_has_no_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "lines", LINES)
    with pytest.raises(PolicyError, match="the protocol lines has neither TLS nor a token"):
        Settings("lines", token_file=Path("token"))


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_can_be_started_and_stopped(name: str, artifact: Path) -> None:
    """Whatever the line says is there, and every one drains."""
    pytest.importorskip(PROTOCOLS[name].package, reason="the extra serve is not installed")
    service = Service.build(artifact, Settings(name, port=0), lambda event, **fields: None)
    stop, heard = asyncio.Event(), []

    async def serve() -> bool:
        def ready(port: int) -> None:
            heard.append(port)
            stop.set()

        return await service.server.serve(stop, ready)

    assert asyncio.run(serve()) and heard[0] > 0
