"""The command: from an artifact to actions in another process, and to its end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.cli import main
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

pytest.importorskip("websockets", reason="the extra serve is not installed")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from omega_qvla.serving.client import RemotePolicy

pytestmark = pytest.mark.long


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def request(**changes: Any) -> dict[str, Any]:
    first = oq.Observations.load("builtin:tiny-pi05")[0]
    return {key: first[key] for key in ("images", "state", "prompt")} | changes


def test_actions_through_the_socket_are_those_of_the_policy_and_sigterm_ends_it_well(
    artifact: Path, serve_command: Callable[..., Any], tmp_path: Path
) -> None:
    """Same artifact, observation and noise: bit for bit the same actions."""
    result = tmp_path / "serve.json"
    server = serve_command(str(artifact), "--port", "0", "--json", str(result))
    port = server.wait_for("ready")["port"]
    assert [event["event"] for event in server.events] == ["loaded", "warm", "ready"]
    policy = oq.load(artifact, threads=1)
    noise = np.random.default_rng(3).standard_normal(policy.noise_shape).astype(np.float32)
    with connect(f"ws://127.0.0.1:{port}") as client:
        told = decode_map(client.recv())
        assert told["artifact"] == policy.content_hash
        assert (told["precision"], told["recipe"]) == ("quantized", "rtn")
        assert told["action_limits"]["high"] == [pytest.approx(1.5)] * 4
        client.send(encode(request(noise=noise)))
        reply = decode_map(client.recv(30))
        left = {"previous": reply["actions"][5:], "delay": 2}
        client.send(encode(request(noise=-noise, **left)))
        continued = decode_map(client.recv(30))
    assert np.array_equal(reply["actions"], policy.sample_actions(request(), noise))
    assert np.array_equal(continued["actions"], policy.sample_actions(request(), -noise, **left))
    assert told["real_time_chunking"]["execution_horizon"] == 10
    assert reply["artifact"] == policy.content_hash
    status, errors = server.end(signal.SIGTERM)
    assert (status, errors) == (0, "")
    assert server.events[-1]["event"] == "drained" and server.events[-1]["finished"]
    document = json.loads(result.read_text())
    assert document["requests"] == {"answered": 2} and document["drained"] is True


def test_sigterm_finishes_what_runs_and_exits_within_five_seconds(
    artifact: Path, serve_command: Callable[..., Any]
) -> None:
    server = serve_command(str(artifact), "--port", "0")
    port = server.wait_for("ready")["port"]
    outcomes: list[str] = []

    def robot() -> None:
        with connect(f"ws://127.0.0.1:{port}") as client:
            client.recv()
            try:
                while True:
                    client.send(encode(request()))
                    answer = client.recv(30)
                    outcomes.append("error" if isinstance(answer, str) else "actions")
            except ConnectionClosed as closed:
                outcomes.append(f"closed {closed.rcvd.code if closed.rcvd else None}")

    robots = [threading.Thread(target=robot) for _ in range(3)]
    for one in robots:
        one.start()
    while "actions" not in outcomes:
        time.sleep(0.05)
    assert server.end(signal.SIGTERM) == (0, "")
    # By the server's clock: a busy machine takes seconds to end an interpreter that holds torch.
    when = {event["event"]: event["time"] for event in server.events}
    assert when["drained"] - when["draining"] < 5.0
    for one in robots:
        one.join()
    assert outcomes.count("closed 1001") == 3


def test_gr00ts_protocol_serves_the_same_artifact(
    artifact: Path, serve_command: Callable[..., Any]
) -> None:
    zmq = pytest.importorskip("zmq", reason="the extra serve is not installed")
    server = serve_command(str(artifact), "--protocol", "gr00t", "--port", "0")
    port = server.wait_for("ready")["port"]
    first = request()
    data = {f"video.{name}": image[None] for name, image in first["images"].items()}
    data |= {"state.state": first["state"][None], "annotation.task": [first["prompt"]]}
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.connect(f"tcp://127.0.0.1:{port}")
        asking.send(encode({"endpoint": "get_action", "data": data}, gr00t_array))
        answer = decode_map(asking.recv())
    assert answer["action.action"].shape == (10, 4)
    assert server.end(signal.SIGINT) == (0, "")


def test_full_precision_is_served_like_an_artifact(
    serve_command: Callable[..., Any], tmp_path: Path
) -> None:
    """The same protocol, bit for bit the actions of the policy in process, and no content hash."""
    result = tmp_path / "serve.json"
    server = serve_command("builtin:tiny-pi05", "--port", "0", "--json", str(result))
    address = f"ws://127.0.0.1:{server.wait_for('ready')['port']}"
    policy = oq.load_policy("builtin:tiny-pi05")
    noise = np.random.default_rng(3).standard_normal(policy.noise_shape).astype(np.float32)
    with RemotePolicy(address) as remote:
        told = remote.metadata
        reply = remote.infer(request(), noise=noise, deadline_ms=60_000.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert np.array_equal(reply["actions"], policy.sample_actions(request(), noise))
    finally:
        torch.set_num_threads(threads)
    assert told["artifact"] is None and reply["artifact"] is None
    assert (told["policy"], told["precision"], told["recipe"]) == ("pi05", "float32", None)
    assert told["specification"]["cameras"] == list(policy.config.cameras)
    assert server.end(signal.SIGTERM) == (0, "")
    assert json.loads(result.read_text())["artifact"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("builtin:tiny-pi05", "--kernel", "reference"), "--kernel is for artifacts"),
        (("builtin:nosuch",), "nosuch"),
        (("{artifact}", "--embodiment", "new"), "full precision"),
    ],
)
def test_options_of_the_other_kind_of_policy_are_refused(
    artifact: Path, arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", *(one.format(artifact=artifact) for one in arguments)) == 2
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("--host", "0.0.0.0"), 2, "--token-file"),
        (("--token-file", "absent"), 2, "cannot read the token file"),
        (("--tls-key", "key.pem"), 2, "--tls-certificate"),
        (("--protocol", "gr00t", "--host", "0.0.0.0"), 2, "--token-file"),
        (("--protocol", "gr00t", "--token-file", "x"), 2, "SSH tunnel"),
        (("--layout", "libero"), 2, "--layout"),
        (("--limits", "absent.json"), 2, "absent.json"),
        (("--batch", "0"), 2, "--batch"),
        (("--port", "70000"), 2, "--port"),
        (("--kernel", "nosuch"), 3, "nosuch"),
    ],
)
def test_what_cannot_be_served_is_one_message(
    artifact: Path,
    arguments: tuple[str, ...],
    status: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("serve", str(artifact), *arguments) == status
    message = capsys.readouterr().err
    assert told in message and message.count("\n") == 1


@pytest.mark.parametrize("protocol", ["openpi", "gr00t"])
def test_a_port_that_is_taken_is_one_message(
    artifact: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run("serve", str(artifact), "--protocol", protocol, "--port", port) == 3
    message = capsys.readouterr().err
    assert "in use" in message and message.count("\n") == 1


def test_a_directory_that_is_no_artifact_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", str(tmp_path)) == 2
    assert "artifact" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"low": [0, 0, 0], "high": [1, 1, 1]}', "4 numbers"),
        ('{"low": [2, 0, 0, 0], "high": [1, 1, 1, 1]}', "low ≤ high"),
        ('{"change": [-1, 0, 0, 0]}', "change ≥ 0"),
        ('{"lowest": []}', "low, high"),
        ("[]", "JSON object"),
        ("{", "cannot read"),
        ('{"low": ["a", 0, 0, 0]}', "4 numbers"),
    ],
)
def test_limits_that_do_not_fit_are_refused(
    artifact: Path, content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "limits.json"
    file.write_text(content)
    assert run("serve", str(artifact), "--limits", str(file)) == 2
    assert told in capsys.readouterr().err


def test_limits_of_the_users_own_withhold_actions(
    artifact: Path, serve_command: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "limits.json"
    file.write_text('{"low": [-0.001, null, null, null], "high": [0.001, null, null, null]}')
    server = serve_command(str(artifact), "--port", "0", "--limits", str(file))
    with connect(f"ws://127.0.0.1:{server.wait_for('ready')['port']}") as client:
        client.recv()
        client.send(encode(request()))
        error = json.loads(client.recv(30))
    assert error["error"] == "unsafe_action" and "dimension 0" in error["message"]
