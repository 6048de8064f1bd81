"""What lies between linears: the C++ kernels against PyTorch, alone and in whole chunks.

    python benchmarks/elementwise.py --out results.json

Norms with their modulation, activations with their product, and rotary positions at the shapes of
pi0.5 and GR00T N1.5; and chunks of the two embedded policies, quantized, whose layers ask now one
and now the other.  The two take turns in every round; times are medians, ratios those of C++ over
PyTorch within a round.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import tyro
from torch import Tensor

import omega_qvla as oq
from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.evaluation.speed.timing import take_turns
from omega_qvla.policies.layers.attention import rotary_table, split_heads
from omega_qvla.policies.layers.elementwise import TORCH, Elementwise, use_elementwise
from omega_qvla.results.writing import write_json
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.fused import CpuElementwise
from omega_qvla.runtime.kernels import cpu

Operation = Callable[[Elementwise], object]
POLICIES = ("builtin:tiny-pi05", "builtin:tiny-gr00t")
BATCHES = (1, 8)


@dataclass(frozen=True)
class Options:
    """How long it measures.

    Attributes:
        out: the JSON.
        rounds: of each operation.
        chunks: rounds of each chunk.
        threads: of both.
    """

    out: Path
    rounds: int = 100
    chunks: int = 60
    threads: int = 1


def operations() -> dict[str, Operation]:
    """By name, as layers ask for them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def gated(rows: int, width: int) -> Operation:
        gate, up = drawn(rows, 2 * width).split(width, dim=-1)
        return lambda way: way.gated_product("gelu_tanh", gate, up)

    def activated(rows: int, width: int) -> Operation:
        x = drawn(rows, width)
        return lambda way: way.activate("gelu_tanh", x)

    def adaptive(rows: int, width: int) -> Operation:
        x, (scale, shift) = drawn(1, rows, width), drawn(2, 1, 1, width)
        return lambda way: way.adaptive_rms_norm(x, scale, shift)

    def adaptive_layer(rows: int, width: int) -> Operation:
        x, (scale, shift) = drawn(1, rows, width), drawn(2, 1, 1, width)
        return lambda way: way.adaptive_layer_norm(x, scale, shift, 1e-5)

    def normed(rows: int, width: int) -> Operation:
        x, gain = drawn(1, rows, width), drawn(width)
        return lambda way: way.rms_norm(x, gain, 1.0)

    def headed(heads: int, rows: int, width: int) -> Operation:
        x, gain = split_heads(drawn(1, rows, heads * width), width), drawn(width)
        return lambda way: way.rms_norm(x, gain, 0.0)

    def layered(rows: int, width: int) -> Operation:
        x, gain, bias = drawn(1, rows, width), drawn(width), drawn(width)
        return lambda way: way.layer_norm(x, 1e-6, gain, bias)

    def rotated(heads: int, rows: int, width: int) -> Operation:
        x = split_heads(drawn(1, rows, heads * width), width)
        table = rotary_table(torch.arange(rows).unsqueeze(0), width)
        return lambda way: way.rotate(x, table)

    return {
        "SigLIP, gelu, 512 x 4304": activated(512, 4304),
        "SigLIP, layer norm, 512 x 1152": layered(512, 1152),
        "pi0.5 backbone, gated gelu, 968 x 16384": gated(968, 16384),
        "pi0.5 backbone, norm, 968 x 2048": normed(968, 2048),
        "pi0.5 backbone, rotary, 8 x 968 x 256": rotated(8, 968, 256),
        "pi0.5 expert, gated gelu, 10 x 4096": gated(10, 4096),
        "pi0.5 expert, adaptive norm, 10 x 1024": adaptive(10, 1024),
        "pi0.5 expert, rotary, 8 x 10 x 256": rotated(8, 10, 256),
        "GR00T backbone, norm of queries, 16 x 296 x 128": headed(16, 296, 128),
        "GR00T DiT, gelu, 49 x 6144": activated(49, 6144),
        "GR00T DiT, adaptive norm, 49 x 1536": adaptive_layer(49, 1536),
    }


def compared(call: Operation, own: CpuElementwise, rounds: int) -> dict[str, float]:
    """Medians of both in microseconds, and the median of their ratios."""
    calls = {"torch": lambda: call(TORCH), "cpp": lambda: call(own)}
    times = take_turns(calls, rounds=rounds, warm_up=3)
    ratios = [mine / theirs for mine, theirs in zip(times["cpp"], times["torch"], strict=True)]
    found = {f"{name}_us": 1e6 * median(values) for name, values in times.items()}
    return {**found, "ratio": median(ratios)}


def chunks(name: str, batch: int, threads: int) -> Operation:
    """A batch of chunks of a quantized embedded policy."""
    observations = list(oq.Observations.load(name))[:batch]
    policy = oq.quantize(oq.load_policy(name), observations, recipe="rtn")
    assert isinstance(policy, QuantizedPolicy)
    inputs = [policy.encode(one) for one in observations]
    source = np.random.default_rng(0)
    noises = [source.standard_normal(policy.noise_shape).astype(np.float32) for _ in inputs]

    def sample(way: Elementwise) -> object:
        use_elementwise(policy.policy.module, way)
        return policy.sample_batch(inputs, noises)

    return sample


def main() -> None:
    """Measure everything and write it."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    name = cpu.instruction_set()
    if name is None:
        raise SystemExit("the C++ kernels are not installed: there is nothing to compare")
    own = CpuElementwise(name, options.threads)
    parts: dict[str, dict[str, dict[str, float]]] = {"operations": {}, "chunks": {}}
    with torch.inference_mode():
        for what, call in operations().items():
            parts["operations"][what] = compared(call, own, options.rounds)
            print(what, parts["operations"][what], flush=True)
    for policy in POLICIES:
        for batch in BATCHES:
            what = f"{policy}, {batch} at once"
            call = chunks(policy, batch, options.threads)
            parts["chunks"][what] = compared(call, own, options.chunks)
            print(what, parts["chunks"][what], flush=True)
    write_json(
        {
            "schema": 1,
            "command": f"python benchmarks/elementwise.py --rounds {options.rounds} "
            f"--chunks {options.chunks} --threads {options.threads} --out FILE",
            "machine": {
                "processor": machine_name(),
                "cores": os.cpu_count(),
                "system": platform.system(),
                "torch": torch.__version__,
                "kernel": name,
            },
            **parts,
        },
        options.out,
    )


if __name__ == "__main__":
    main()
