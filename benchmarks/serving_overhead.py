"""What the socket costs: the engine alone and through the server, in turns.

    python benchmarks/serving_overhead.py --artifact DIR --rounds 400 --out results.json

Two 224 px cameras, one policy, one machine, loopback.  Each round times one chunk in process and
one through ``omega-qvla serve``; each of the two processes sleeps while the other computes.  The
overhead of a round is what a client waits beyond the server's own inference time (``infer_ms``),
so it holds queueing, both codecs, both copies through the kernel, and the checks; the difference
of the medians of both columns says the same in another way.

Then 1, 2, 4 and 8 clients ask at the same time.  With k robots a batch of k takes ``share(k)``
times a batch of one, and an answer may wait for one such batch and then take another: the p99 is
to stay below 2 × p99(1) × share(k).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from soak_serving import build_artifact, quantiles, robot_observation, served

import omega_qvla as oq
from omega_qvla.errors import ServingError
from omega_qvla.serving.client import RemotePolicy
from omega_qvla.serving.engine import PolicyEngine

SIDE = 224
CLIENTS = (1, 2, 4, 8)


def large_observation() -> dict[str, Any]:
    """The robot's words and state with two 224 px images of noise."""
    source = np.random.default_rng(0)
    observation = robot_observation()
    images = {
        name: source.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        for name in observation["images"]
    }
    return {**observation, "images": images}


def interleaved(artifact: Path, port: int, rounds: int) -> dict[str, Any]:
    """Engine alone and through the socket, one after the other."""
    torch.set_num_threads(1)
    engine = PolicyEngine(oq.load(artifact, threads=1))
    observation = large_observation()
    times: dict[str, list[float]] = {"engine": [], "socket": [], "overhead": []}
    with RemotePolicy(f"ws://127.0.0.1:{port}") as policy:
        noise = np.zeros(policy.noise_shape, np.float32)
        for number in range(rounds + 5):
            started = perf_counter()
            engine.sample([engine.encode(observation)], [noise])
            alone = perf_counter() - started
            started = perf_counter()
            reply = policy.infer(observation, noise=noise)
            through = perf_counter() - started
            if number < 5:
                continue
            overhead = through - reply["server_timing"]["infer_ms"] / 1e3
            for name, value in zip(times, (alone, through, overhead), strict=True):
                times[name].append(value)
    figures: dict[str, Any] = {name: quantiles(values) for name, values in times.items()}
    figures["difference_of_medians_ms"] = figures["socket"]["p50_ms"] - figures["engine"]["p50_ms"]
    return figures


def together(port: int, clients: int, rounds: int) -> dict[str, Any]:
    """Latencies of clients that ask at the same time."""
    observation = large_observation()
    took: list[float] = []
    batches: list[int] = []
    refused: list[str] = []

    def robot() -> None:
        with RemotePolicy(f"ws://127.0.0.1:{port}") as policy:
            for _ in range(rounds):
                started = perf_counter()
                try:
                    reply = policy.infer(observation)
                except ServingError as error:
                    refused.append(error.code)
                    continue
                took.append(perf_counter() - started)
                batches.append(reply["batch"])

    robots = [threading.Thread(target=robot) for _ in range(clients)]
    for one in robots:
        one.start()
    for one in robots:
        one.join()
    mean = float(np.mean(batches)) if batches else None
    return {"clients": clients, **quantiles(took), "mean_batch": mean, "refused": len(refused)}


def batch_share(artifact: Path, rounds: int) -> dict[int, float]:
    """Median time of a batch of k over that of a batch of one, in turns."""
    engine = PolicyEngine(oq.load(artifact, threads=1))
    encoded = engine.encode(large_observation())
    horizon_width = engine.specification().noise_shape
    times: dict[int, list[float]] = {size: [] for size in CLIENTS}
    for _ in range(max(5, rounds // 20)):
        for size, values in times.items():
            noises = [np.zeros(horizon_width, np.float32)] * size
            started = perf_counter()
            engine.sample([encoded] * size, noises)
            values.append(perf_counter() - started)
    return {size: float(np.median(v) / np.median(times[1])) for size, v in times.items()}


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact = options.artifact or build_artifact(Path(folder))
        document: dict[str, Any] = {"schema": 1, "load_average": os.getloadavg()[0]}
        with served(artifact, "--limits", "none", "--deadline-ms", "60000") as (port, _):
            document["overhead"] = interleaved(artifact, port, options.rounds)
            rows = [together(port, clients, options.rounds // 4) for clients in CLIENTS]
        share = batch_share(artifact, options.rounds)
    for row in rows:
        row["batch_share"] = share[row["clients"]]
        row["p99_bound_ms"] = 2 * rows[0]["p99_ms"] * row["batch_share"]
    document["clients"] = rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
