"""What the socket costs: the engine alone and through the server, in turns.

    python benchmarks/serving_overhead.py --rounds 1000 --requests 2000 --out results.json

Two 224 px cameras, one policy, one machine, loopback.  Each round times one chunk in process and
one through ``omega-qvla serve``; each of the two processes sleeps while the other computes.  The
overhead is given twice and both must hold: what a client waits beyond the server's own inference
time (``infer_ms``), which holds queueing, both codecs, both copies through the kernel and the
checks; and the median difference between the two columns of a round, which also holds what the
engine itself loses by running inside a server.

Then 1, 2, 4 and 8 clients ask at the same time, as many requests in all for each number.  With k
robots a batch of k takes ``share(k)`` times a batch of one, encoding included, and an answer may
wait for one such batch and then take another: the p99 is to stay below 2 × p99(1) × share(k), and
nobody may be refused.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from serving_kit import (
    Bar,
    at_least,
    at_most,
    build_artifact,
    finish,
    measure_missing,
    number,
    quantiles,
    resumed,
    robot_observations,
    say,
    served,
)

import omega_qvla as oq
from omega_qvla.errors import ServingError
from omega_qvla.serving.client import RemotePolicy
from omega_qvla.serving.server.policy_engine import PolicyEngine

SIDE = 224
CLIENTS = (1, 2, 4, 8)
WARM = 5
OVERHEAD_MS = 2.0
RELAXED = ("--limits", "none", "--deadline-ms", "60000")


def large_observation() -> dict[str, Any]:
    """The robot's words and state with two 224 px images of noise."""
    source = np.random.default_rng(0)
    observation = robot_observations()[0]
    images = {
        name: source.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        for name in observation["images"]
    }
    return {**observation, "images": images}


def interleaved(artifact: Path, rounds: int) -> dict[str, Any]:
    """Engine alone and through the socket, one after the other."""
    torch.set_num_threads(1)
    engine = PolicyEngine(oq.load(artifact, threads=1).policy)
    observation = large_observation()
    times: dict[str, list[float]] = {
        "engine": [],
        "socket": [],
        "beyond_inference": [],
        "difference": [],
    }
    with (
        served(artifact, *RELAXED) as server,
        RemotePolicy(f"ws://127.0.0.1:{server.port}") as policy,
    ):
        noise = np.zeros(policy.noise_shape, np.float32)
        for number in range(rounds + WARM):
            started = perf_counter()
            engine.sample([engine.encode(observation)], [noise])
            alone = perf_counter() - started
            started = perf_counter()
            reply = policy.infer(observation, noise=noise)
            through = perf_counter() - started
            if number < WARM:
                continue
            beyond = through - reply["server_timing"]["infer_ms"] / 1e3
            found = (alone, through, beyond, through - alone)
            for name, value in zip(times, found, strict=True):
                times[name].append(value)
            if (number - WARM + 1) % 200 == 0:
                say(f"overhead: {number - WARM + 1} of {rounds} rounds")
    return {name: quantiles(values) for name, values in times.items()}


def together(port: int, clients: int, requests: int) -> dict[str, Any]:
    """Latencies of clients that ask at the same time; each one's first answers do not count."""
    each = -(-requests // clients)
    observation = large_observation()
    took: list[float] = []
    batches: list[int] = []
    refused: list[str] = []

    def robot() -> None:
        with RemotePolicy(f"ws://127.0.0.1:{port}") as policy:
            for number in range(each + WARM):
                started = perf_counter()
                try:
                    reply = policy.infer(observation)
                except ServingError as error:
                    refused.append(error.code)
                    continue
                if number < WARM:
                    continue
                took.append(perf_counter() - started)
                batches.append(reply["batch"])

    robots = [threading.Thread(target=robot) for _ in range(clients)]
    for one in robots:
        one.start()
    for one in robots:
        one.join()
    say(f"{clients} clients: {len(took)} answers")
    mean = float(np.mean(batches)) if batches else None
    return {"clients": clients, **quantiles(took), "mean_batch": mean, "refused": len(refused)}


def crowded(artifact: Path, requests: int) -> list[dict[str, Any]]:
    """A row for each number of clients."""
    with served(artifact, *RELAXED) as server:
        return [together(server.port, clients, requests) for clients in CLIENTS]


def batch_share(artifact: Path, rounds: int) -> dict[str, float]:
    """Median time of a batch of k over that of a batch of one, in turns, encoding included."""
    torch.set_num_threads(1)
    engine = PolicyEngine(oq.load(artifact, threads=1).policy)
    observation, shape = large_observation(), engine.specification().noise_shape
    times: dict[int, list[float]] = {size: [] for size in CLIENTS}
    for _ in range(rounds):
        for size, values in times.items():
            started = perf_counter()
            encoded = [engine.encode(observation) for _ in range(size)]
            engine.sample(encoded, [np.zeros(shape, np.float32)] * size)
            values.append(perf_counter() - started)
    return {str(size): float(np.median(v) / np.median(times[1])) for size, v in times.items()}


def bars_of(parts: dict[str, Any]) -> list[Bar]:
    """The figures against what they must be."""
    overhead, rows = parts["overhead"], parts["clients"]
    bars = [
        at_most(f"overhead p50 ms, {name}", overhead[name]["p50_ms"], OVERHEAD_MS)
        for name in ("beyond_inference", "difference")
    ]
    for row in rows[1:]:
        share = parts["batch_share"][str(row["clients"])]
        limit = 2 * number(rows[0]["p99_ms"]) * number(share)
        bars.append(at_most(f"p99 ms of {row['clients']} clients", row["p99_ms"], limit))
    bars += [at_most(f"refused of {r['clients']} clients", r["refused"], 0) for r in rows]
    return [*bars, at_least("requests per number of clients", min(r["count"] for r in rows), 1000)]


def main() -> None:
    """Measure what is missing and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=1000, help="of the overhead")
    parser.add_argument("--requests", type=int, default=2000, help="for each number of clients")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "requests": options.requests}
    document = resumed(options.out, {**settings, "artifact": str(options.artifact or "embedded")})
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder))
        experiments = {
            "overhead": lambda: interleaved(artifact, options.rounds),
            "clients": lambda: crowded(artifact, options.requests),
            "batch_share": lambda: batch_share(artifact, max(5, options.rounds // 20)),
        }
        parts = measure_missing(options.out, document, experiments)
    document["bars"] = bars_of(parts)
    finish(options.out, document)


if __name__ == "__main__":
    main()
