"""A server under load, for long: overload, slow clients, and a million requests.

    python benchmarks/soak_serving.py --artifact DIR --out results.json
    python benchmarks/soak_serving.py --short --out results.json

The server is ``omega-qvla serve`` in a process of its own; what is measured is what clients see and
what ``/proc`` says of that process.  Without ``--artifact`` the embedded policy is quantized first.

* ``overload``: clients that together ask for ten times what the server can do.  Refusals and health
  must come within 50 ms, admitted requests within twice the p99 of a single client.
* ``slow_clients``: half-open sockets beside one good client, whose p99 must move less than 10 %.
* ``soak``: requests one after the other; the memory's slope, descriptors, and a canary request
  with fixed noise whose actions must stay identical.

Times mean something on a quiet machine only; the JSON says what the load average was.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import omega_qvla as oq
from omega_qvla.errors import ServingError
from omega_qvla.serving.client import RemotePolicy

PAGE = os.sysconf("SC_PAGE_SIZE")
POLICY = "builtin:tiny-pi05"
DRAIN_S = 5.0
"""By the server's own clock: how long the interpreter takes to leave is the machine's affair."""


def build_artifact(folder: Path) -> Path:
    """The embedded policy, quantized with the quickest recipe."""
    observations = list(oq.Observations.load(POLICY))[:4]
    quantized = oq.quantize(oq.load_policy(POLICY), observations, recipe="rtn")
    return quantized.save_pretrained(folder / "artifact")


def robot_observation() -> dict[str, Any]:
    """What a robot sends."""
    first = oq.Observations.load(POLICY)[0]
    return {key: first[key] for key in ("images", "state", "prompt")}


@contextlib.contextmanager
def served(artifact: Path, *arguments: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server; it must drain in time and end with status 0."""
    command = [sys.executable, "-m", "omega_qvla.cli", "serve", str(artifact), "--port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                break
        else:
            raise SystemExit("the server did not become ready")
        yield event["port"], process.pid
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
        times = {event["event"]: event["time"] for event in map(json.loads, rest.splitlines())}
        if process.returncode or times["drained"] - times["draining"] > DRAIN_S:
            raise SystemExit(f"the server ended with {process.returncode}, or not in time: {times}")
    finally:
        process.kill()
        process.wait()


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Count, p50 and p99 in milliseconds."""
    values = 1e3 * np.asarray(seconds or [float("nan")])
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"count": len(seconds), "p50_ms": float(p50), "p99_ms": float(p99)}


def ask_for(policy: RemotePolicy, observation: dict[str, Any], seconds: float) -> list[float]:
    """Latencies of one client that asks as fast as it is answered."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        policy.infer(observation)
        took.append(time.perf_counter() - started)
    return took


def overload(artifact: Path, *, clients: int, seconds: float) -> dict[str, Any]:
    """Sixty-four robots on a server for one."""
    observation = robot_observation()
    admitted: list[float] = []
    refused: list[float] = []
    health: list[float] = []
    with served(artifact, "--batch", "1") as (port, _):
        address = f"ws://127.0.0.1:{port}"
        with RemotePolicy(address) as policy:
            single = ask_for(policy, observation, max(2.0, seconds / 20))
        pause = clients * float(np.median(single)) / 10  # ten times the server's capacity
        end = time.monotonic() + seconds

        def robot(number: int) -> None:
            with RemotePolicy(address) as policy:
                time.sleep(pause * number / clients)
                while time.monotonic() < end:
                    started = time.perf_counter()
                    try:
                        policy.infer(observation)
                        admitted.append(time.perf_counter() - started)
                    except ServingError as error:
                        if error.code not in ("overloaded", "stale"):
                            raise
                        refused.append(time.perf_counter() - started)
                    time.sleep(max(0.0, started + pause - time.perf_counter()))

        robots = [threading.Thread(target=robot, args=(i,)) for i in range(clients)]
        for one in robots:
            one.start()
        while time.monotonic() < end:
            started = time.perf_counter()
            if get_status(port, "/healthz") != 200:
                raise SystemExit("the server is not healthy")
            health.append(time.perf_counter() - started)
            time.sleep(0.2)
        for one in robots:
            one.join()
    single_p99 = quantiles(single)["p99_ms"]
    return {
        "clients": clients,
        "seconds": seconds,
        "single": quantiles(single),
        "admitted": quantiles(admitted),
        "refused": quantiles(refused),
        "health": quantiles(health),
        "admitted_p99_over_single_p99": quantiles(admitted)["p99_ms"] / single_p99,
    }


def get_status(port: int, path: str) -> int:
    """Status of one HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


def slow_clients(artifact: Path, *, sockets: int, seconds: float) -> dict[str, Any]:
    """One good client, alone and beside half-open sockets, in turns."""
    observation = robot_observation()
    alone: list[float] = []
    beside: list[float] = []
    timed_out = 0
    with (
        served(artifact) as (port, _),
        RemotePolicy(f"ws://127.0.0.1:{port}") as policy,
    ):
        for _ in range(4):
            alone += ask_for(policy, observation, seconds / 8)
            opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(sockets)]
            beside += ask_for(policy, observation, seconds / 8)
            timed_out += sum(map(is_closed, opened))
    before, during = quantiles(alone), quantiles(beside)
    return {
        "sockets": 4 * sockets,
        "timed_out": timed_out,
        "alone": before,
        "beside": during,
        "p99_ratio": during["p99_ms"] / before["p99_ms"],
    }


def is_closed(one: socket.socket) -> bool:
    """Whether the server closes a half-open socket within its time."""
    one.settimeout(10.0)
    try:
        return one.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    finally:
        one.close()


def soak(artifact: Path, *, requests: int, steps: int) -> dict[str, Any]:
    """Requests one after the other; memory, descriptors and a canary."""
    observation = robot_observation()
    marks: list[tuple[int, int, int]] = []
    every = max(1, requests // 50)
    differing = 0
    with (
        served(artifact, "--steps", str(steps)) as (port, pid),
        RemotePolicy(f"ws://127.0.0.1:{port}") as policy,
    ):
        noise = np.random.default_rng(1).standard_normal(policy.noise_shape).astype(np.float32)
        canary = policy.sample_actions(observation, noise)
        for number in range(1, requests + 1):
            policy.infer(observation)
            if number % every == 0:
                differing += not np.array_equal(policy.sample_actions(observation, noise), canary)
                descriptors = len(os.listdir(f"/proc/{pid}/fd"))
                marks.append((number, resident_bytes(pid), descriptors))
    counts, resident, descriptors = (np.array(column) for column in zip(*marks, strict=True))
    settled = slice(len(marks) // 5, None)  # allocators fill their pools first
    slope = np.polyfit(counts[settled], resident[settled], 1)[0]
    return {
        "requests": requests,
        "memory_slope_bytes_per_100k": float(slope * 1e5),
        "resident_bytes": [int(resident[0]), int(resident[-1])],
        "descriptors": [int(descriptors.min()), int(descriptors.max())],
        "canaries": len(marks),
        "canaries_differing": differing,
    }


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def problems(document: dict[str, Any]) -> list[str]:
    """What is not as it must be; times are judged in the full run only."""
    found: list[str] = []
    soaked = document["soak"]
    if soaked["canaries_differing"]:
        found.append("the canary's actions changed")
    if soaked["descriptors"][1] > soaked["descriptors"][0] + 2:
        found.append(f"descriptors grew: {soaked['descriptors']}")
    if document["slow_clients"]["timed_out"] != document["slow_clients"]["sockets"]:
        found.append("half-open sockets were not timed out")
    if (
        not document["overload"]["admitted"]["count"]
        or not document["overload"]["refused"]["count"]
    ):
        found.append("the overload was none")
    if document["short"]:
        return found
    if soaked["memory_slope_bytes_per_100k"] > 1e6:
        found.append("memory grows by more than 1 MB per 100,000 requests")
    loaded = document["overload"]
    if loaded["admitted_p99_over_single_p99"] > 2.0:
        found.append("admitted requests take more than twice a single client's p99")
    found += [
        f"{kind} take more than 50 ms"
        for kind in ("refused", "health")
        if loaded[kind]["p99_ms"] > 50.0
    ]
    if document["slow_clients"]["p99_ratio"] > 1.1:
        found.append("slow clients move a good client's p99 by more than 10 %")
    return found


def main() -> None:
    """Run the three experiments and write their JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1, help="denoising steps of the soak")
    parser.add_argument("--short", action="store_true", help="seconds instead of hours")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder))
        document = run(artifact, options.short, options.requests, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))
    if document["problems"]:
        raise SystemExit(1)


def run(artifact: Path, short: bool, requests: int, steps: int) -> dict[str, Any]:
    """All three, at full length or in short form."""
    document: dict[str, Any] = {"schema": 1, "short": short, "load_average": os.getloadavg()[0]}
    clients, seconds = (16, 6.0) if short else (64, 600.0)
    document["overload"] = overload(artifact, clients=clients, seconds=seconds)
    sockets, seconds = (50, 4.0) if short else (250, 240.0)
    document["slow_clients"] = slow_clients(artifact, sockets=sockets, seconds=seconds)
    document["soak"] = soak(
        artifact, requests=min(requests, 100) if short else requests, steps=steps
    )
    return {**document, "problems": problems(document)}


if __name__ == "__main__":
    main()
