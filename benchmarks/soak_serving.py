"""A server under load, for long: overload, slow clients, and a million requests.

    python benchmarks/soak_serving.py --out results.json
    python benchmarks/soak_serving.py --short --out results.json

The server is ``omega-qvla serve`` in a process of its own; what is measured is what clients see and
what ``/proc`` says of that process.  Without ``--artifact`` the embedded policy is quantized first.
The three parts are written as they finish, and the same command continues with the next one;
``--parts`` chooses among them.

* ``overload``: clients that together ask for ten times what the server can do (it computes them one
  by one, so that capacity is one over the median of a single client).  Refusals and health must
  come within 50 ms, admitted requests within twice the p99 of a single client, and the line, which
  is bounded to one place for that, must stay as short.  That the load really was ten times the
  capacity is a bar too.
* ``slow_clients``: one good client, alone and beside a thousand half-open sockets, in turns as
  long as the sockets may stay.  A third of them say nothing, a third half a request, a third open a
  websocket and then send half a message.  The good client's p99 must stay below twice what it is
  alone, and every socket must be closed.
* ``soak``: robots that ask one request after the other, of many observations, all at the same time,
  their connections renewed now and then; the memory's slope, descriptors, and between two rounds a
  canary, alone, with fixed noise, whose actions must stay identical.  Several robots, because
  batches are what a server computes, and because a million requests take less time in batches.
  ``--minutes`` ends it early: then the bar on the number of requests fails.

The JSON's bars are those of the parts that were measured.

Times mean something on a quiet machine only; the JSON says what the load average was.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from serving_kit import (
    Bar,
    at_least,
    at_most,
    build_artifact,
    finish,
    measure_missing,
    quantiles,
    resumed,
    robot_observations,
    say,
    served,
)
from websockets.asyncio.client import connect

from omega_qvla.errors import ServingError
from omega_qvla.serving.client import RemotePolicy
from omega_qvla.serving.wire import decode_map, encode

PAGE = os.sysconf("SC_PAGE_SIZE")
TIMES_CAPACITY = 10
DRAIN_S = 5.0
TURN_S = 10.0
CLOSED_WITHIN_S = 30.0
"""After the last was opened: 5 s for a handshake, 20 s for a client that answers no ping."""
MARKS = 100
SWITCH_S = 0.0005
"""How long one of the load's threads may keep Python's lock: the others have clocks to read."""
ROBOTS = 16
"""At the same time, in the soak: a batch."""


def ask_for(policy: RemotePolicy, observation: dict[str, Any], seconds: float) -> list[float]:
    """Latencies of one client that asks as fast as it is answered."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        policy.infer(observation)
        took.append(time.perf_counter() - started)
    return took


# --- overload --------------------------------------------------------------------------------


class Crowd:
    """Robots that ask at fixed intervals, and what they heard.

    One event loop asks for all of them, with a message that is encoded once: on a machine of two
    cores a robot's own work is time that the server lacks.

    Args:
        port: of the server.
        clients: how many robots.
        pause_s: between one request of a robot and the next.
    """

    def __init__(self, port: int, clients: int, pause_s: float) -> None:
        self.admitted: list[float] = []
        self.in_server: list[float] = []
        self.refused: list[float] = []
        self.failures: list[str] = []
        self._connected = 0
        self._address = f"ws://127.0.0.1:{port}"
        self._clients, self._pause_s = clients, pause_s
        self._message = encode(robot_observations()[0])

    def start(self, seconds: float) -> threading.Thread:
        """Let every robot ask for so long, once all are connected; returns what waits for them."""
        crowd = threading.Thread(target=lambda: asyncio.run(self._all(seconds)), daemon=True)
        crowd.start()
        return crowd

    async def _all(self, seconds: float) -> None:
        ready = asyncio.Event()
        await asyncio.gather(*(self._robot(n, ready, seconds) for n in range(self._clients)))

    async def _robot(self, number: int, ready: asyncio.Event, seconds: float) -> None:
        try:
            async with connect(self._address, compression=None) as connection:
                await connection.recv()
                self._connected += 1
                if self._connected == self._clients:
                    ready.set()
                await ready.wait()
                end = time.monotonic() + seconds
                await asyncio.sleep(self._pause_s * number / self._clients)
                while time.monotonic() < end:
                    started = time.perf_counter()
                    await connection.send(self._message)
                    heard = self._understood(await connection.recv())
                    took = time.perf_counter() - started
                    heard.append(took)
                    await asyncio.sleep(max(0.0, self._pause_s - took))
        except Exception as error:  # the others go on, without this one where they waited for it
            ready.set()
            self.failures.append(f"{type(error).__name__}: {error}")

    def _understood(self, answer: str | bytes) -> list[float]:
        if isinstance(answer, bytes):
            timing = decode_map(answer)["server_timing"]
            self.in_server.append(1e-3 * (timing["queue_ms"] + timing["infer_ms"]))
            return self.admitted
        code = json.loads(answer)["error"]
        if code not in ("overloaded", "stale"):
            raise ServingError(code, answer)
        return self.refused


def overload(artifact: Path, *, clients: int, seconds: float) -> dict[str, Any]:
    """Many robots on a server that computes for one at a time."""
    health: list[float] = []
    waiting: list[float] = []
    with served(artifact, "--batch", "1", "--waiting", "1", "--limits", "none") as server:
        with RemotePolicy(f"ws://127.0.0.1:{server.port}") as policy:
            alone = ask_for(policy, robot_observations()[0], max(2.0, seconds / 10))
        median = float(np.median(alone))
        crowd = Crowd(server.port, clients, clients * median / TIMES_CAPACITY)
        began, resident = time.monotonic(), resident_bytes(server.pid)
        asking = crowd.start(seconds)
        while asking.is_alive():
            started = time.perf_counter()
            status, _ = get(server.port, "/healthz")
            health.append(time.perf_counter() - started)
            if status != 200:
                crowd.failures.append(f"health answered {status}")
            waiting.append(gauge(get(server.port, "/metrics")[1], "omega_qvla_waiting"))
            time.sleep(0.2)
            if len(health) % 150 == 0:
                say(f"overload: {len(crowd.admitted)} admitted, {len(crowd.refused)} refused")
        took = time.monotonic() - began
        grown = resident_bytes(server.pid) - resident
    single, admitted = quantiles(alone), quantiles(crowd.admitted)
    asked = len(crowd.admitted) + len(crowd.refused)
    return {
        "clients": clients,
        "seconds": took,
        "single": single,
        "admitted": admitted,
        "admitted_in_server": quantiles(crowd.in_server),
        "refused": quantiles(crowd.refused),
        "health": quantiles(health),
        "longest_line": max(waiting),
        "asked_over_capacity": asked / took * median,
        "admitted_p99_over_single_p99": admitted["p99_ms"] / single["p99_ms"],
        "resident_growth_bytes": grown,
        "failures": crowd.failures[:20],
        "failure_count": len(crowd.failures),
        "drain": {"status": server.status, "seconds": server.drain_s},
    }


def get(port: int, path: str) -> tuple[int, str]:
    """Status and text of one HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def gauge(text: str, name: str) -> float:
    """A value of Prometheus' text."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


# --- slow clients ----------------------------------------------------------------------------


def half_open(port: int, number: int) -> socket.socket:
    """A socket that says nothing, half a request, or half a message after a handshake."""
    one = socket.create_connection(("127.0.0.1", port), timeout=10.0)
    with contextlib.suppress(OSError):  # closed already: that is what is wanted
        if number % 3:
            one.sendall(b"GET / HTTP/1.1\r\nHost: robot\r\n")
        if number % 3 == 2:
            key = base64.b64encode(bytes(16))
            one.sendall(
                b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                b"Sec-WebSocket-Key: " + key + b"\r\n\r\n"
            )
            one.sendall(b"\x82\xfe\x7f\xff\x00\x00\x00\x00" + bytes(1000))
    return one


def is_closed(one: socket.socket, until: float) -> bool:
    """Whether the server ends a connection before a moment of the monotonic clock."""
    try:
        while True:
            one.settimeout(max(0.01, until - time.monotonic()))
            if one.recv(4096) == b"":
                return True
    except TimeoutError:
        return False
    except OSError:
        return True
    finally:
        one.close()


def open_and_wait(port: int, sockets: int) -> int:
    """Open half-open sockets, all as fast as they are taken; how many the server closes in time."""
    allow_descriptors()
    opened: list[socket.socket] = []
    for number in range(sockets):
        with contextlib.suppress(OSError):
            opened.append(half_open(port, number))
    until = time.monotonic() + CLOSED_WITHIN_S
    return sum(is_closed(one, until) for one in opened)


def slow_clients(artifact: Path, *, sockets: int, turns: int) -> dict[str, Any]:
    """One good client, alone and beside half-open sockets, in turns.

    The sockets are another process's: in this one they would share Python's lock with the clock.
    """
    observation = robot_observations()[0]
    alone: list[float] = []
    beside: list[float] = []
    closed = 0
    with (
        served(artifact, "--limits", "none") as server,
        RemotePolicy(f"ws://127.0.0.1:{server.port}") as policy,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as others,
    ):
        others.submit(allow_descriptors).result()
        ask_for(policy, observation, 1.0)
        for turn in range(turns):
            alone += ask_for(policy, observation, TURN_S)
            opening = others.submit(open_and_wait, server.port, sockets)
            beside += ask_for(policy, observation, TURN_S)
            closed += opening.result()
            say(f"slow clients: turn {turn + 1} of {turns}, {closed} sockets closed")
    before, during = quantiles(alone), quantiles(beside)
    return {
        "sockets": sockets,
        "turns": turns,
        "opened": turns * sockets,
        "closed": closed,
        "alone": before,
        "beside": during,
        "p99_ratio": during["p99_ms"] / before["p99_ms"],
        "drain": {"status": server.status, "seconds": server.drain_s},
    }


# --- soak ------------------------------------------------------------------------------------


def soak(artifact: Path, *, requests: int, steps: int, minutes: float) -> dict[str, Any]:
    """Rounds of requests; after each one memory, descriptors and a canary."""
    observations = robot_observations()
    marks: list[tuple[int, int, int]] = []
    differing = done = 0
    every = max(2 * ROBOTS, requests // MARKS)
    end = time.monotonic() + 60 * minutes
    relaxed = ("--limits", "none", "--deadline-ms", "60000")
    together = ("--steps", str(steps), "--batch", str(ROBOTS))
    with served(artifact, *together, *relaxed) as server:
        address = f"ws://127.0.0.1:{server.port}"
        canary, _ = ask_canary(address, observations[0], server.pid)
        while done < requests and time.monotonic() < end:
            numbers = range(done, min(done + every, requests))
            done += asyncio.run(ask_all(address, observations, numbers, end))
            actions, descriptors = ask_canary(address, observations[0], server.pid)
            differing += not np.array_equal(actions, canary)
            marks.append((done, resident_bytes(server.pid), descriptors))
            if len(marks) % 5 == 0:
                say(f"soak: {done} of {requests} requests, {marks[-1][1] >> 20} MB")
    if not marks:
        raise SystemExit("the soak ended before its first round did: give it more --minutes")
    counts, resident, opened = (np.array(column) for column in zip(*marks, strict=True))
    settled = slice(len(marks) // 5, None)  # allocators fill their pools first
    slope = np.polyfit(counts[settled], resident[settled], 1)[0]
    return {
        "requests": done,
        "robots": ROBOTS,
        "observations": len(observations),
        "memory_slope_bytes_per_100k": float(slope * 1e5),
        "resident_bytes": [int(resident[0]), int(resident[-1])],
        "descriptors": [int(opened.min()), int(opened.max())],
        "marks": [[int(value) for value in mark] for mark in marks],
        "canaries": len(marks),
        "canaries_differing": differing,
        "drain": {"status": server.status, "seconds": server.drain_s},
    }


async def ask_all(
    address: str, observations: Sequence[dict[str, Any]], numbers: range, end: float
) -> int:
    """Requests of these numbers by robots with a connection each; how many were answered in time.

    One event loop for all robots: their own work is time that the server lacks.
    """

    async def robot(numbers: range) -> int:
        async with connect(address, compression=None) as connection:
            await connection.recv()
            for answered, number in enumerate(numbers):
                if time.monotonic() >= end:
                    return answered
                observation = observations[number % len(observations)]
                await connection.send(encode({**observation, "request_id": number}))
                answer = await connection.recv()
                if isinstance(answer, str) or decode_map(answer)["request_id"] != number:
                    raise ServingError("soak", f"request {number} was answered by {answer!r:.300}")
        return len(numbers)

    return sum(await asyncio.gather(*(robot(numbers[first::ROBOTS]) for first in range(ROBOTS))))


def ask_canary(address: str, observation: dict[str, Any], pid: int) -> tuple[np.ndarray, int]:
    """Actions of a robot that is alone, from fixed noise, and the server's descriptors then."""
    with RemotePolicy(address) as policy:
        noise = np.random.default_rng(1).standard_normal(policy.noise_shape).astype(np.float32)
        return policy.sample_actions(observation, noise), len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


# --- bars ------------------------------------------------------------------------------------


def bars_of(name: str, part: dict[str, Any], requests: int | None) -> list[Bar]:
    """What must hold of one part.

    Args:
        requests: what was asked of the soak; None: seconds on any machine, however busy, where
            only what can be counted must hold.
    """
    drain = part["drain"]
    return [
        *BARS[name](part, requests),
        at_most(f"{name}: drain s", drain["seconds"], DRAIN_S),
        at_most(f"{name}: exit status", drain["status"], 0),
    ]


def overload_bars(part: dict[str, Any], requests: int | None) -> list[Bar]:
    """Bounded, quick to refuse, and quick enough for who is admitted."""
    counted = [
        at_least("overload: answered", part["admitted"]["count"], 1),
        at_least("overload: refused", part["refused"]["count"], 1),
        at_most("overload: failures", part["failure_count"], 0),
        at_most("overload: longest line", part["longest_line"], 1),
    ]
    if requests is None:
        return counted
    ratio = part["admitted_p99_over_single_p99"]
    return [
        *counted,
        at_least("overload: seconds", part["seconds"], 600),
        at_least("overload: asked over capacity", part["asked_over_capacity"], 9.0),
        at_most("overload: admitted p99 over single p99", ratio, 2.0),
        at_most("overload: refused p99 ms", part["refused"]["p99_ms"], 50.0),
        at_most("overload: health p99 ms", part["health"]["p99_ms"], 50.0),
        at_most("overload: growth of memory, bytes", part["resident_growth_bytes"], 64 << 20),
    ]


def slow_bars(part: dict[str, Any], requests: int | None) -> list[Bar]:
    """Every socket closed, and nothing of it felt."""
    counted = [at_least("slow clients: sockets closed", part["closed"], part["opened"])]
    if requests is None:
        return counted
    return [
        *counted,
        at_least("slow clients: at the same time", part["sockets"], 1000),
        at_most("slow clients: p99 ratio of the good client", part["p99_ratio"], 2.0),
    ]


def soak_bars(part: dict[str, Any], requests: int | None) -> list[Bar]:
    """The same actions, descriptors and memory after all of it."""
    first, last = part["descriptors"]
    counted = [
        at_most("soak: canaries that differ", part["canaries_differing"], 0),
        at_most("soak: growth of descriptors", last - first, 2),
    ]
    if requests is None:
        return counted
    slope = part["memory_slope_bytes_per_100k"]
    return [
        *counted,
        at_least("soak: requests", part["requests"], requests),
        at_most("soak: bytes per 100,000 requests", slope, 1e6),
    ]


BARS = {"overload": overload_bars, "slow_clients": slow_bars, "soak": soak_bars}
"""Of each part."""


def allow_descriptors() -> None:
    """As many sockets as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are missing and write their JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=1e6, help="of the soak, at most")
    parser.add_argument("--overload-minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=1, help="denoising steps of the soak")
    parser.add_argument("--parts", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--short", action="store_true", help="seconds instead of hours")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    allow_descriptors()
    sys.setswitchinterval(SWITCH_S)
    short = options.short
    requests = min(options.requests, 100) if short else options.requests
    settings = {"short": short, "requests": requests, "steps": options.steps}
    settings |= {"overload_minutes": options.overload_minutes, "robots": ROBOTS}
    document = resumed(options.out, {**settings, "artifact": str(options.artifact or "embedded")})
    parts = document["parts"]
    if parts.get("soak", {"requests": requests})["requests"] < requests:
        del parts["soak"]  # ended early; a server's memory is watched from its start
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder))
        clients, seconds = (16, 6.0) if short else (64, 60 * options.overload_minutes)
        sockets, turns = (200, 1) if short else (1000, 16)
        experiments = {
            "overload": lambda: overload(artifact, clients=clients, seconds=seconds),
            "slow_clients": lambda: slow_clients(artifact, sockets=sockets, turns=turns),
            "soak": lambda: soak(
                artifact, requests=requests, steps=options.steps, minutes=options.minutes
            ),
        }
        wanted = {name: run for name, run in experiments.items() if name in options.parts}
        measure_missing(options.out, document, wanted)
    asked = None if short else requests
    document["bars"] = [bar for name in parts for bar in bars_of(name, parts[name], asked)]
    finish(options.out, document)


if __name__ == "__main__":
    main()
