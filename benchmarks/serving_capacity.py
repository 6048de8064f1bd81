"""Refusals of robots that ask one thing at a time: 1 to 16 robots, batches of 1, 2, 4 and 8.

    python benchmarks/serving_capacity.py --out results.json

The server is ``omega-qvla serve`` in a process of its own with its default settings and one
denoising step, once per ``--batch``.  Every robot has a connection and asks again as soon as its
answer is there.  While deadlines can be kept nobody may be refused; on a machine where sixteen
robots take longer than the default deadline, give a longer one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving_kit import (
    at_most,
    build_artifact,
    finish,
    measure_missing,
    resumed,
    robot_observations,
    say,
    served,
)
from websockets.asyncio.client import connect

from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.serving.wire import encode

BATCHES = (1, 2, 4, 8)


async def ask_all(port: int, robots: int, requests: int) -> dict[str, Any]:
    """How so many requests of so many robots end, and the longest anyone waited."""
    ended: Counter[str] = Counter()
    longest = 0.0
    message = encode(robot_observations()[0])
    left = requests

    async def robot() -> None:
        nonlocal left, longest
        async with connect(f"ws://127.0.0.1:{port}", compression=None) as connection:
            await connection.recv()
            while left:
                left -= 1
                started = time.monotonic()
                await connection.send(message)
                answer = await connection.recv()
                longest = max(longest, time.monotonic() - started)
                refused = isinstance(answer, str)
                ended[json.loads(answer)["error"] if refused else "answered"] += 1

    await asyncio.gather(*(robot() for _ in range(robots)))
    return {"ended": dict(ended), "longest_ms": 1e3 * longest}


def refusals(
    artifact: Path, batch: int, robots: Sequence[int], requests: int, *options: str
) -> dict[str, Any]:
    """Outcomes by number of robots."""
    found: dict[str, Any] = {}
    arguments = ("--batch", str(batch), "--steps", "1", "--limits", "none", *options)
    with served(artifact, *arguments) as server:
        for count in robots:
            found[str(count)] = asyncio.run(ask_all(server.port, count, requests))
        say(f"batch {batch}: {found}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="for each robots and batch")
    parser.add_argument("--robots", type=int, nargs="+", default=list(range(1, 17)))
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    parser.add_argument("--deadline-ms", default=None, help="of the server; its own by default")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    document = resumed(options.out, settings)
    deadline = () if options.deadline_ms is None else ("--deadline-ms", options.deadline_ms)
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_artifact(Path(folder), recipe=options.recipe)
        experiments = {
            f"batch {batch}": lambda batch=batch: refusals(
                artifact, batch, options.robots, options.requests, *deadline
            )
            for batch in BATCHES
        }
        parts = measure_missing(options.out, document, experiments)
    document["bars"] = [
        at_most(
            f"{name}, {robots} robots: not answered",
            sum(one["ended"].values()) - one["ended"].get("answered", 0),
            0,
        )
        for name, part in parts.items()
        for robots, one in part.items()
    ]
    finish(options.out, document)


if __name__ == "__main__":
    main()
