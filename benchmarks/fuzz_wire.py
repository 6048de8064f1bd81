"""Malformed requests: against the parser in bulk, against a running server one by one.

    python benchmarks/fuzz_wire.py --count 5000000 --live 20000 --seed 0 --out results.json

Two experiments.  *Parser*: valid requests of both dialects are damaged by one to three mutations
(bytes flipped, cut, inserted; dtypes among them objects, structures and texts; shapes that do not
match; depth; sizes announced and absent; NaN) and go through decoder and specification.  Each must
end in a request or in ``ServingError``, within a second.  *Live*: such messages are sent to a real
server over a websocket; each must be answered, never with a traceback, and after every hundred a
good request must still get its actions.

Also imported by the tests, which run a few thousand rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from omega_qvla.errors import ServingError
from omega_qvla.serving.core import Core, Rules
from omega_qvla.serving.door import Listening
from omega_qvla.serving.gr00t import parse_observation
from omega_qvla.serving.safety import ActionLimits
from omega_qvla.serving.specification import Specification, parse_request
from omega_qvla.serving.websocket import WebsocketFront
from omega_qvla.serving.wire import decode_map, encode, gr00t_array

TIME_LIMIT_S = 1.0
SPECIFICATION = Specification(
    cameras=("base", "wrist"),
    state_dim=4,
    horizon=5,
    action_dim=3,
    noise_shape=(5, 3),
    state_parts=(("arm", 3), ("gripper", 1)),
)
DTYPES = ("|O", "O", "|V8", "V", "<M8[ns]", "<m8[s]", "<U4", "|S4", ">f4", "<c8", "<f16", "", "f")
NUMBERS = (None, True, -1, 0, 1, 2**31, 2**63, 2**64 - 1, 0.5, 1e300, float("nan"), float("inf"))
VALUES: tuple[Any, ...] = (*NUMBERS, "", "x", "x" * 3000, b"", b"\0" * 64, [], {}, [[[[]]]], [{}])


class ConstantEngine:
    """Answers zeros: here the road to the policy is tested, not the policy."""

    def prepare_thread(self) -> None:
        """Nothing to prepare."""

    def encode(self, observation: Mapping[str, Any]) -> Any:
        """As it is."""
        return observation

    def sample(self, inputs: Sequence[Any], noises: Sequence[Any]) -> list[np.ndarray]:
        """Zeros."""
        return [np.zeros((5, 3), np.float32) for _ in inputs]


@dataclass
class Result:
    """What happened.

    Attributes:
        rounds: messages.
        accepted: those that were requests after all.
        codes: errors by code.
        problems: what must not happen.
        slowest_s: the longest time one message took.
    """

    rounds: int = 0
    accepted: int = 0
    codes: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])
    slowest_s: float = 0.0

    def dump(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "rounds": self.rounds,
            "accepted": self.accepted,
            "codes": dict(self.codes),
            "slowest_s": self.slowest_s,
            "problems": self.problems[:100],
            "problem_count": len(self.problems),
        }


def openpi_request() -> dict[str, Any]:
    """A good request in openpi's dialect."""
    image = np.zeros((4, 5, 3), np.uint8)
    return {
        "images": {"base": image, "wrist": image},
        "state": np.zeros(4, np.float32),
        "prompt": "press the button",
        "request_id": 7,
        "noise": np.zeros((5, 3), np.float32),
    }


def gr00t_request() -> dict[str, Any]:
    """A good observation in GR00T's dialect."""
    image = np.zeros((1, 4, 5, 3), np.uint8)
    return {
        "video.base": image,
        "video.wrist": image,
        "state.arm": np.zeros((1, 3), np.float32),
        "state.gripper": np.zeros((1, 1), np.float32),
        "annotation.task": ["press the button"],
    }


# --- mutations of the value, then of its bytes -----------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += places(inner)
    return found


def spelled_out(value: Any, gr00t: bool) -> Any:
    """Arrays as the maps they are on the wire, so that mutations reach inside them."""
    if isinstance(value, np.ndarray):
        if gr00t:
            return dict(gr00t_array(value))
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": list(value.shape),
        }
    if isinstance(value, dict):
        return {key: spelled_out(item, gr00t) for key, item in value.items()}
    return [spelled_out(item, gr00t) for item in value] if isinstance(value, list) else value


def replace_value(message: Any, rng: random.Random) -> None:
    """Something else in one place."""
    container, key = rng.choice(places(message))
    container[key] = copy.deepcopy(rng.choice(VALUES))


def remove_value(message: Any, rng: random.Random) -> None:
    """One place less."""
    container, key = rng.choice(places(message))
    del container[key]


def change_dtype(message: Any, rng: random.Random) -> None:
    """A dtype nobody accepts, or another one of those that are accepted."""
    found = [(c, k) for c, k in places(message) if k == b"dtype"]
    if found:
        container, key = rng.choice(found)
        container[key] = rng.choice((*DTYPES, "<f4", "|b1", "<i8", "|u1", "<f2"))


def change_shape(message: Any, rng: random.Random) -> None:
    """A shape that does not fit the bytes."""
    found = [(c, k) for c, k in places(message) if k == b"shape"]
    if found:
        container, key = rng.choice(found)
        container[key] = [rng.choice((0, 1, 3, 4, -1, 2**40)) for _ in range(rng.randrange(8))]


def deepen(message: Any, rng: random.Random) -> None:
    """Lists in lists in lists."""
    container, key = rng.choice(places(message))
    value: Any = None
    for _ in range(rng.randrange(1, 200)):
        value = [value]
    container[key] = value


def poison(message: Any, rng: random.Random) -> None:
    """NaN or Inf among the numbers of an array."""
    arrays = [c for c, k in places(message) if k == b"data" and isinstance(c[k], bytes)]
    found = [(c, b"data") for c in arrays if len(c[b"data"]) >= 4]
    if found:
        container, key = rng.choice(found)
        data = bytearray(container[key])
        at = 4 * rng.randrange(len(data) // 4)
        data[at : at + 4] = np.float32(rng.choice((np.nan, np.inf, -np.inf))).tobytes()
        container[key] = bytes(data)


VALUE_MUTATIONS = (replace_value, remove_value, change_dtype, change_shape, deepen, poison)


def flip(data: bytearray, rng: random.Random) -> None:
    """A few bytes."""
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    """The end is missing."""
    del data[rng.randrange(len(data) + 1) :]


def insert(data: bytearray, rng: random.Random) -> None:
    """Bytes in between, among them the tags of large containers."""
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((b"\xdf\xff\xff\xff\xff", b"\xc1", b"\xc7\xff\x01", rng.randbytes(9)))


BYTE_MUTATIONS = (flip, cut, insert)


def malformed(rng: random.Random) -> tuple[bytes, bool]:
    """A damaged message, and whether it is of GR00T's dialect."""
    gr00t = rng.random() < 0.3
    message = spelled_out(gr00t_request() if gr00t else openpi_request(), gr00t)
    for _ in range(rng.choice((0, 1, 1, 2))):
        if message:
            rng.choice(VALUE_MUTATIONS)(message, rng)
    data = bytearray(encode(message))
    if rng.random() < 0.5:
        rng.choice(BYTE_MUTATIONS)(data, rng)
    return bytes(data), gr00t


# --- the two experiments ---------------------------------------------------------------------


def run_parser(count: int, seed: int) -> Result:
    """``count`` damaged messages through decoder and specification."""
    result, rng = Result(), random.Random(seed)
    for number in range(count):
        data, gr00t = malformed(rng)
        parse: Callable[..., Any] = parse_observation if gr00t else parse_request
        started = time.perf_counter()
        try:
            request = parse(decode_map(data), SPECIFICATION)
            result.accepted += 1
            _require_sound(request, result, number)
        except ServingError as error:
            result.codes[error.code] += 1
            if "Traceback" in str(error) or len(str(error)) > 2000:
                result.problems.append(f"{number}: an error of {len(str(error))} characters")
        except Exception as error:
            result.problems.append(f"{number}: {type(error).__name__}: {error}")
        took = time.perf_counter() - started
        result.slowest_s = max(result.slowest_s, took)
        if took > TIME_LIMIT_S:
            result.problems.append(f"{number}: took {took:.1f} s")
        result.rounds += 1
    return result


def _require_sound(request: Any, result: Result, number: int) -> None:
    """What was accepted must be what the policy is promised."""
    state = request.observation["state"]
    images = request.observation["images"].values()
    sound = state.shape == (4,) and bool(np.isfinite(state).all())
    if not sound or any(image.dtype != np.uint8 or image.ndim != 3 for image in images):
        result.problems.append(f"{number}: accepted what is no observation")


def run_live(count: int, seed: int) -> Result:
    """``count`` damaged messages to a server; every hundredth time a good one."""
    core = Core(
        ConstantEngine(),
        SPECIFICATION,
        ActionLimits((-1.0,) * 3, (1.0,) * 3, (1.0,) * 3),
        artifact="fuzz",
        generator=np.random.default_rng(0),
        rules=Rules(batch=1, waiting=4, deadline_s=10.0),
    )
    core.start()
    result = Result()
    stop, ready, port = asyncio.Event(), threading.Event(), [0]
    loop = asyncio.new_event_loop()

    def listen(number: int) -> None:
        port[0] = number
        ready.set()

    front = WebsocketFront(core, Listening(port=0))
    server = threading.Thread(target=lambda: loop.run_until_complete(front.serve(stop, listen)))
    server.start()
    ready.wait()
    _send_all(port[0], count, random.Random(seed), result)
    loop.call_soon_threadsafe(stop.set)
    server.join()
    loop.close()
    return result


def _send_all(port: int, count: int, rng: random.Random, result: Result) -> None:
    sent = 0
    while sent < count:
        with connect(f"ws://127.0.0.1:{port}", compression=None) as client:
            client.recv()
            try:
                while sent < count:
                    sent += 1
                    _send(client, malformed(rng)[0], result)
                    if sent % 100 == 0:
                        client.send(encode(openpi_request()))
                        if isinstance(client.recv(10), str):
                            result.problems.append(f"{sent}: a good request was refused")
            except ConnectionClosed as closed:
                result.problems.append(f"{sent}: the connection was closed: {closed}")


def _send(client: Any, data: bytes, result: Result) -> None:
    started = time.perf_counter()
    client.send(data)
    answer = client.recv(10)
    result.slowest_s = max(result.slowest_s, time.perf_counter() - started)
    result.rounds += 1
    if isinstance(answer, str):
        content = json.loads(answer)
        result.codes[content["error"]] += 1
        if "Traceback" in answer or content["error"] == "internal":
            result.problems.append(f"{result.rounds}: {answer[:200]}")
    else:
        result.accepted += 1


def main() -> None:
    """Run both experiments and write their JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5_000_000)
    parser.add_argument("--live", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: dict[str, Any] = {"schema": 1, "seed": options.seed}
    results["parser"] = run_parser(options.count, options.seed).dump()
    results["live"] = run_live(options.live, options.seed).dump()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results["peak_rss_growth_bytes"] = (after - before) * 1024
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if results["parser"]["problem_count"] or results["live"]["problem_count"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
