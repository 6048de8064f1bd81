"""Malformed requests: against the parser in bulk, against running servers one by one.

    python benchmarks/fuzz_wire.py --count 5000000 --live 500000 --seed 0 --out results.json

Three parts.  ``parser``: valid requests of both dialects are damaged by up to three mutations
(bytes flipped, cut, inserted; dtypes among them objects, structures and texts; shapes that do not
match; depth; sizes announced and absent; NaN) and go through decoder and specification.  Each must
end in a request or in ``ServingError``, within a second.  ``websocket``, ``gr00t``: such messages
are sent to a real server; each must be answered, never with a traceback, after every hundred a good
request must still get its actions, and after every ten thousand comes one beyond the limit of
16 MB, which may end its own connection and nothing else.

A mutation can leave a message valid.  Those are accepted, checked and *not* counted: ``--count``
and ``--live`` (for each server) are messages that were refused.

The counts are reached in blocks, each with a generator of its own; as many as there are ``--jobs``
run at the same time, each in a process of its own with its own server.  The document is written
after every such wave: a run that was cut short, or ended by ``--minutes``, continues with the same
command.  The messages are packed by ``msgpack``, which is not what is tested.  Also imported by the
tests, which run a few thousand messages.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import hashlib
import json
import multiprocessing
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq
from serving_kit import at_least, at_most, finish, resumed, say
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from omega_qvla.errors import ServingError
from omega_qvla.files import write_json
from omega_qvla.serving.server.protocol_server import Listening
from omega_qvla.serving.server.protocols.gr00t import Gr00tServer, parse_observation
from omega_qvla.serving.server.protocols.openpi import OpenpiServer
from omega_qvla.serving.server.safety import ActionLimits
from omega_qvla.serving.server.scheduler import BatchingConfig, BatchScheduler
from omega_qvla.serving.wire import DEFAULT_BOUNDS, decode_map, encode, gr00t_array
from omega_qvla.serving.wire.specification import Specification, parse_request

TIME_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 256 << 20
"""Growth of a process's peak, three parts together: 16 MB messages pass through several hands."""
BLOCKS = {"parser": 50_000, "websocket": 10_000, "gr00t": 10_000}
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

    def encode(self, observation: Mapping[str, Any], left_over: Any = None) -> Any:
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
        oversize: messages beyond the limit that a server got.
    """

    rounds: int = 0
    accepted: int = 0
    codes: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])
    slowest_s: float = 0.0
    oversize: int = 0

    @property
    def refused(self) -> int:
        """Messages that really were malformed."""
        return self.codes.total()

    def dump(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "rounds": self.rounds,
            "accepted": self.accepted,
            "refused": self.refused,
            "codes": dict(self.codes),
            "oversize": self.oversize,
            "slowest_s": self.slowest_s,
            "problems": self.problems[:100],
            "problem_count": len(self.problems),
        }


def added(total: dict[str, Any] | None, block: dict[str, Any]) -> dict[str, Any]:
    """Two results as one."""
    if total is None:
        return block
    counts = ("rounds", "accepted", "refused", "oversize", "problem_count", "blocks")
    return {
        **{name: total[name] + block[name] for name in counts},
        "codes": dict(Counter(total["codes"]) + Counter(block["codes"])),
        "slowest_s": max(total["slowest_s"], block["slowest_s"]),
        "problems": (total["problems"] + block["problems"])[:100],
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
    data = bytearray(msgpack.packb(message))
    if rng.random() < 0.5:
        rng.choice(BYTE_MUTATIONS)(data, rng)
    return bytes(data), gr00t


# --- the three parts ---------------------------------------------------------------------------


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


@contextlib.contextmanager
def serving(server_of: Callable[[BatchScheduler], Any]) -> Iterator[int]:
    """The port of a server that answers zeros, in a thread of its own."""
    scheduler = BatchScheduler(
        ConstantEngine(),
        SPECIFICATION,
        ActionLimits((-1.0,) * 3, (1.0,) * 3, (1.0,) * 3),
        artifact="fuzz",
        generator=np.random.default_rng(0),
        batching=BatchingConfig(batch=1, waiting=4, deadline_s=10.0),
    )
    scheduler.start()
    stop, ready, port = asyncio.Event(), threading.Event(), [0]
    loop = asyncio.new_event_loop()

    def listen(number: int) -> None:
        port[0] = number
        ready.set()

    server = server_of(scheduler)
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(stop, listen)))
    thread.start()
    try:
        if not ready.wait(30):
            raise SystemExit("the server did not become ready")
        yield port[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run_websocket(count: int, seed: int) -> Result:
    """``count`` damaged messages to a websocket server; every hundredth time a good one."""
    result, rng = Result(), random.Random(seed)
    with serving(lambda scheduler: OpenpiServer(scheduler, Listening())) as port:
        while result.rounds < count:
            with connect(f"ws://127.0.0.1:{port}", compression=None) as client:
                client.recv()
                try:
                    while result.rounds < count:
                        client.send(malformed(rng)[0])
                        answer = _timed(client.recv, result)
                        _judge(json.loads(answer) if isinstance(answer, str) else None, result)
                        if result.rounds % 100 == 0:
                            client.send(encode(openpi_request()))
                            if isinstance(client.recv(10), str):
                                result.problems.append("a good request was refused")
                except ConnectionClosed as closed:
                    result.problems.append(f"{result.rounds}: the connection was closed: {closed}")
        with connect(f"ws://127.0.0.1:{port}", compression=None) as client:
            result.oversize += 1
            client.recv()
            with contextlib.suppress(ConnectionClosed):
                client.send(bytes(DEFAULT_BOUNDS.message_bytes + 1))
                client.recv(10)
                result.problems.append("a message beyond the limit was answered")
        with connect(f"ws://127.0.0.1:{port}", compression=None) as client:
            client.recv()
            client.send(encode(openpi_request()))
            if isinstance(client.recv(10), str):
                result.problems.append("after a message beyond the limit nothing is served")
    return result


def run_gr00t(count: int, seed: int) -> Result:
    """``count`` damaged messages to a ZMQ server; every hundredth time a good one."""
    result, rng = Result(), random.Random(seed)
    good = encode({"endpoint": "get_action", "data": gr00t_request()}, gr00t_array)
    with (
        serving(lambda scheduler: Gr00tServer(scheduler, Listening())) as port,
        zmq.Context() as context,
    ):
        with _asking(context, port) as client:
            while result.rounds < count:
                client.send(malformed_call(rng))
                answer = decode_map(_timed(lambda seconds: client.recv(), result))
                failed = "error" in answer
                told = {"error": answer.get("code"), "message": answer.get("error")}
                _judge(told if failed else None, result)
                if result.rounds % 100 == 0:
                    client.send(good)
                    if "error" in decode_map(client.recv()):
                        result.problems.append("a good request was refused")
        with _asking(context, port) as client:
            result.oversize += 1
            client.setsockopt(zmq.RCVTIMEO, 500)
            client.send(bytes(DEFAULT_BOUNDS.message_bytes + 1))
            with contextlib.suppress(zmq.Again):
                client.recv()
                result.problems.append("a message beyond the limit was answered")
        with _asking(context, port) as client:
            client.send(good)
            if "error" in decode_map(client.recv()):
                result.problems.append("after a message beyond the limit nothing is served")
    return result


def malformed_call(rng: random.Random) -> bytes:
    """A damaged observation in a whole call, or a call that is damaged itself."""
    data, _ = malformed(rng)
    if rng.random() < 0.5:
        return data
    call = spelled_out({"endpoint": "get_action", "data": gr00t_request()}, gr00t=True)
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(VALUE_MUTATIONS)(call["data"] or call, rng)
    return msgpack.packb(call)


@contextlib.contextmanager
def _asking(context: zmq.Context[Any], port: int) -> Iterator[Any]:
    with context.socket(zmq.REQ) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.setsockopt(zmq.RCVTIMEO, 10_000)
        client.connect(f"tcp://127.0.0.1:{port}")
        yield client


def _timed(receive: Callable[[float], Any], result: Result) -> Any:
    started = time.perf_counter()
    answer = receive(10)
    took = time.perf_counter() - started
    result.slowest_s = max(result.slowest_s, took)
    return answer


def _judge(error: dict[str, Any] | None, result: Result) -> None:
    """Book one answer; None stands for actions."""
    result.rounds += 1
    if error is None:
        result.accepted += 1
        return
    result.codes[str(error["error"])] += 1
    if "Traceback" in str(error["message"]) or error["error"] == "internal":
        result.problems.append(f"{result.rounds}: {str(error)[:200]}")


PARTS: dict[str, Callable[[int, int], Result]] = {
    "parser": run_parser,
    "websocket": run_websocket,
    "gr00t": run_gr00t,
}


def run_block(name: str, count: int, seed: int) -> dict[str, Any]:
    """One block, and what it says of its process: who it is, and its peak memory around it."""
    before = _peak_bytes()
    result = PARTS[name](count, seed).dump()
    return {"result": result, "pid": os.getpid(), "before": before, "after": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the blocks that are missing and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5_000_000, help="refused by the parser")
    parser.add_argument("--live", type=int, default=500_000, help="refused by each server")
    parser.add_argument("--minutes", type=float, default=1e6, help="of this run, at most")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    wanted = {"parser": options.count, "websocket": options.live, "gr00t": options.live}
    document = resumed(options.out, {**wanted, "seed": options.seed})
    parts, end = document["parts"], time.monotonic() + 60 * options.minutes
    before: dict[int, int] = {}
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for name, limit in wanted.items():
            size = min(BLOCKS[name], max(1, limit))
            while parts.get(name, {"refused": 0})["refused"] < limit and time.monotonic() < end:
                first = parts.get(name, {"blocks": 0})["blocks"]
                wave = range(first, first + options.jobs)
                seeds = [_seed(options.seed, name, number) for number in wave]
                for block in pool.starmap(run_block, [(name, size, seed) for seed in seeds], 1):
                    parts[name] = added(parts.get(name), {**block["result"], "blocks": 1})
                    growth = block["after"] - before.setdefault(block["pid"], block["before"])
                    known = document.get("peak_rss_growth_bytes", 0)
                    document["peak_rss_growth_bytes"] = max(growth, known)
                write_json(document, options.out)
                say(f"{name}: {parts[name]['refused']} of {limit} refused")
    document["bars"] = []
    for name, limit in wanted.items():
        found = parts.get(name, Result().dump())
        document["bars"] += [
            at_least(f"{name}: malformed messages", found["refused"], limit),
            at_most(f"{name}: problems", found["problem_count"], 0),
        ]
    growth = document.get("peak_rss_growth_bytes", 0)
    document["bars"].append(at_most("growth of the peak memory, bytes", growth, MEMORY_LIMIT_BYTES))
    finish(options.out, document)


def _seed(seed: int, name: str, block: int) -> int:
    """Of a block: none is that of another part or run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name} {block}".encode()).digest()[:8], "big")


if __name__ == "__main__":
    main()
