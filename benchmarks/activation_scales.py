"""What the three kinds of activation scales cost in the C++ kernels.

    python benchmarks/activation_scales.py --out results.json

The layers of pi0.5's action expert at ten rows: one static scale (``omega-w4a4-static``), one
scale per token, and one per token of inputs whose mean is subtracted first
(``omega-w4a4-no-prior``).  The three take turns, each on the next of several
copies of the layer, so that none finds its weights in a cache that another one filled.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import tyro
from torch import Tensor

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.files import write_json
from omega_qvla.runtime.kernels import cpu

LAYERS = {"qkv": (2560, 1024), "o": (1024, 2048), "gate_up": (8192, 1024), "down": (1024, 4096)}
"""Outputs and inputs."""
ROWS, BLOCK, COPIES = 10, 64, 16


@dataclass(frozen=True)
class Options:
    """How long it measures.

    Attributes:
        out: the JSON.
        rounds: calls of each kind.
        threads: of the kernels.
    """

    out: Path
    rounds: int = 1000
    threads: int = 2


def kinds(n: int, k: int, threads: int) -> dict[str, Callable[[int], Tensor]]:
    """A call on one of the copies, for each kind of scale."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    transform = (torch.randn((k // BLOCK, BLOCK, BLOCK), generator=generator) / 8).bfloat16()
    layers = [
        cpu.PackedLinear(
            pack_int4(drawn),
            torch.ones(n),
            columns=k,
            group=None,
            transform=transform,
            bias=None,
            activation_bits=4,
            activation_clip=0.9,
            path=cpu.instruction_set(),
        )
        for _ in range(COPIES)
    ]
    rows = torch.randn((ROWS, k), generator=generator)
    scale, offset = torch.tensor(0.3), torch.randn(k, generator=generator)
    bias = cpu.spread_bias(torch.randn(n, generator=generator))
    return {
        "static": lambda copy: layers[copy](rows, scale, threads),
        "per_token": lambda copy: layers[copy](rows, None, threads),
        "per_token_subtract_mean": lambda copy: layers[copy](
            rows, None, threads, offset=offset, bias=bias
        ),
    }


def main() -> None:
    """Measure every layer and write medians in microseconds and their ratios to a static scale."""
    options = tyro.cli(Options, description=__doc__)
    found: dict[str, dict[str, float]] = {}
    for name, (n, k) in LAYERS.items():
        calls = kinds(n, k, options.threads)
        times: dict[str, list[float]] = {kind: [] for kind in calls}
        turn = 0
        for _ in range(options.rounds):
            for kind, call in calls.items():
                turn += 1
                started = perf_counter()
                call(turn % COPIES)
                times[kind].append(perf_counter() - started)
        medians = {kind: 1e6 * median(values) for kind, values in times.items()}
        ratios = {f"{kind}_ratio": value / medians["static"] for kind, value in medians.items()}
        found[name] = {**{f"{kind}_us": value for kind, value in medians.items()}, **ratios}
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    machine = {"processor": machine_name(), "cores": os.cpu_count(), "system": platform.system()}
    command = f"python benchmarks/activation_scales.py --rounds {options.rounds}"
    document = {
        "schema": 1,
        "command": f"{command} --threads {options.threads} --out FILE",
        "machine": {**machine, "kernel": cpu.instruction_set()},
        "rows": ROWS,
        "layers": found,
    }
    write_json(document, options.out)


if __name__ == "__main__":
    main()
