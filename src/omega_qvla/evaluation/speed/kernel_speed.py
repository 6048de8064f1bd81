"""How fast one quantized linear is: the shapes of the policies, against what PyTorch offers.

All peers compute the same layer on the same rows, taking turns.  Ours is the whole path, from
float32 rows through the 64 × 64 block transform, quantization and integer product to float32.  A
policy's weights do not fit into the cache between two calls of a layer, so every peer walks through
copies of its weight that together exceed any cache (``COLD_BYTES``).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.speed.llama_cpp import LLAMA_CPP, Q4_0_BYTES_PER_WEIGHT, Ggml
from omega_qvla.evaluation.speed.timing import medians, percentile, take_turns
from omega_qvla.runtime.kernels import cpu
from omega_qvla.threads import available_cores, check_threads, torch_threads

COLD_BYTES = 96 << 20
"""Weights a peer walks through: three times the largest cache of common machines."""


_RATIOS = (
    "vs_fp32",
    "vs_int8_dynamic",
    "vs_llama_cpp",
    "share_of_peak",
    "share_of_vpmaddubsw_peak",
)


@dataclass(frozen=True)
class Shape:
    """One linear layer of a policy: y [M, N] = x [M, K] Wᵀ.

    Attributes:
        site: where it occurs.
        static: whether its activation scale is static (per step) rather than per token.
        group: inputs per weight scale, or None.
    """

    site: str
    M: int
    N: int
    K: int
    static: bool = False
    group: int | None = None


def _family(
    site: str, rows: int, sizes: Sequence[tuple[int, int]], static: bool = False
) -> list[Shape]:
    return [Shape(site, rows, n, k, static) for n, k in sizes]


_EXPERT = ((2048, 1024), (256, 1024), (1024, 2048), (4096, 1024), (1024, 4096))
_BACKBONE = ((2048, 2048), (256, 2048), (16384, 2048), (2048, 16384))
_GROOT = ((2048, 2048), (1024, 2048), (6144, 2048), (2048, 6144))
_DIT = ((1536, 1536), (6144, 1536), (1536, 6144))
_SIGLIP = ((1152, 1152), (4304, 1152), (1152, 4304))
_EXPERT_FUSED = ((2560, 1024), (1024, 2048), (8192, 1024), (1024, 4096))
_BACKBONE_FUSED = ((2560, 2048), (2048, 2048), (32768, 2048), (2048, 16384))

SHAPES: tuple[Shape, ...] = (
    *_family("pi0.5 expert, M = 10", 10, _EXPERT, static=True),
    *_family("pi0.5 expert, M = 50", 50, _EXPERT, static=True),
    *_family("pi0.5 expert as fused, M = 10", 10, _EXPERT_FUSED, static=True),
    *_family("pi0.5 expert as fused, M = 50", 50, _EXPERT_FUSED, static=True),
    *_family("GR00T DiT, M = 49", 49, _DIT, static=True),
    *_family("GR00T cross K/V, M = 552", 552, ((1536, 2048),), static=True),
    *_family("SigLIP, M = 512", 512, _SIGLIP),
    *_family("GR00T LLM, M = 552", 552, _GROOT),
    *_family("pi0.5 backbone, M = 568", 568, _BACKBONE),
    *_family("pi0.5 backbone as fused, M = 568", 568, _BACKBONE_FUSED),
    *_family("pi0.5 backbone, M = 968", 968, _BACKBONE),
    Shape("pi0.5 expert, group 64", 10, 4096, 1024, True, 64),
    Shape("pi0.5 expert, group 64", 50, 4096, 1024, True, 64),
    Shape("pi0.5 backbone, group 64", 568, 2048, 2048, False, 64),
)
"""The matrix products of one action chunk: as the checkpoints have them, and as the engine fuses
q/k/v and gate/up, which share one transform and one quantization."""


def measure_shape(
    shape: Shape,
    *,
    rounds: int,
    threads: int,
    peaks: dict[str, float],
    kernel: str | None = None,
    llama_cpp: Ggml | None = None,
    cold_bytes: int = COLD_BYTES,
) -> list[dict[str, Any]]:
    """Rows of one shape, one per peer (keys: docs/json.md).

    Args:
        peaks: multiply-adds per second by instruction set.
        kernel: our instruction set; the best one when None.
        llama_cpp: llama.cpp's libraries, to have its 4-bit path as a further peer.

    Raises:
        ResourceError: the C++ kernels are not installed or this processor lacks the one asked for,
            or more threads than cores.
    """
    name = kernel or _require_kernel()
    check_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((shape.M, shape.K), generator=generator)
    with torch_threads(threads):
        calls = {
            name: _ours(shape, rows, threads, generator, cold_bytes, kernel),
            "torch fp32": _float(shape, rows, cold_bytes),
            "torch int8 dynamic": _int8_dynamic(shape, rows, cold_bytes),
        }
        if llama_cpp is not None and llama_cpp.supports(shape.K):
            copies = _copies(shape.N * shape.K * Q4_0_BYTES_PER_WEIGHT, cold_bytes)
            calls[LLAMA_CPP] = llama_cpp.linear(rows, shape.N, copies=copies, threads=threads)
        found = medians(take_turns(calls, rounds=rounds, warm_up=2))
    macs = shape.M * shape.N * shape.K
    return [
        {
            "site": shape.site,
            "M": shape.M,
            "N": shape.N,
            "K": shape.K,
            "group": shape.group,
            "activation": "static" if shape.static else "per_token",
            "kernel": kernel,
            "threads": threads,
            "rounds": rounds,
            "weights_in_cache": False,
            "median_us": 1e6 * seconds,
            "gmacs": macs / seconds / 1e9,
            "vs_fp32": found["torch fp32"] / seconds,
            "vs_int8_dynamic": found["torch int8 dynamic"] / seconds,
            "vs_llama_cpp": found[LLAMA_CPP] / seconds if LLAMA_CPP in found else None,
            "share_of_peak": macs / seconds / peaks[name] if kernel == name else None,
            "share_of_vpmaddubsw_peak": macs / seconds / peaks["avx2"]
            if kernel == name and "avx2" in peaks
            else None,
        }
        for kernel, seconds in found.items()
    ]


def measure_peaks(threads: int) -> dict[str, float]:
    """Peak multiply-adds per second of every path of this processor."""
    return {
        name: cpu.peak_macs(name, threads=threads, seconds=0.2) for name in cpu.instruction_sets()
    }


def measure_bandwidth(threads: int, size: int = 256 << 20) -> float:
    """Bytes per second that come from memory when an array larger than any cache is added up."""
    with torch_threads(threads):
        array = torch.ones(size // 8, dtype=torch.float64)
        return size / min(take_turns({"sum": array.sum}, rounds=7)["sum"])


def machine_name() -> str:
    """The processor as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios over all layers of a site: sums of medians, as a policy would add them up."""
    peers = ("torch fp32", "torch int8 dynamic", LLAMA_CPP)
    ours = [row for row in rows if row["kernel"] not in peers]
    summary = []
    for site in dict.fromkeys(row["site"] for row in ours):
        mine = [row for row in ours if row["site"] == site]
        total = sum(row["median_us"] for row in mine)
        macs = sum(row["M"] * row["N"] * row["K"] for row in mine)
        entry: dict[str, Any] = {"site": site, "gmacs": macs / total / 1e3}
        for key in _RATIOS:
            if all(row[key] is not None for row in mine):
                entry[key] = sum(row[key] * row["median_us"] for row in mine) / total
        summary.append(entry)
    return summary


def measure_contention(*, calls: int, threads: int, kernel: str | None = None) -> dict[str, Any]:
    """Latency of a call of about 0.3 ms, alone and with every core kept busy by other processes.

    The caller sleeps between calls, as a robot's control loop does.

    Raises:
        ResourceError: as ``measure_shape``.
    """
    _require_kernel()
    check_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shape = Shape("contention", 10, 4096, 1024, static=True)
    rows = torch.randn((shape.M, shape.K), generator=generator)
    call = _ours(shape, rows, threads, generator, 8 << 20, kernel)
    idle = _latencies(call, calls)
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_burn, daemon=True) for _ in range(available_cores())]
    for other in others:
        other.start()
    try:
        sleep(2.0)  # until all of them are at work
        busy = _latencies(call, calls)
    finally:
        for other in others:
            other.terminate()
    return {
        "threads": threads,
        "calls": calls,
        "idle_p50_us": 1e6 * median(idle),
        "idle_p99_us": 1e6 * percentile(idle, 0.99),
        "busy_p50_us": 1e6 * median(busy),
        "busy_p99_us": 1e6 * percentile(busy, 0.99),
        "busy_p99_over_idle_p50": percentile(busy, 0.99) / median(idle),
    }


def _latencies(call: Callable[[], object], calls: int) -> list[float]:
    found = []
    for _ in range(calls + 5):
        sleep(0.005)
        begin = perf_counter()
        call()
        found.append(perf_counter() - begin)
    return found[5:]


def _burn() -> None:
    while True:
        sum(range(10_000))


def _require_kernel() -> str:
    name = cpu.instruction_set()
    if name is None:
        raise ResourceError(
            "the C++ kernels are not installed, so there is nothing to measure; install a C++ "
            "compiler (apt-get install g++) and reinstall omega-qvla"
        )
    return name


def _copies(weight_bytes: float, cold_bytes: int) -> int:
    return max(2, int(cold_bytes / weight_bytes) + 1)


def _ours(
    shape: Shape,
    rows: Tensor,
    threads: int,
    generator: torch.Generator,
    cold_bytes: int,
    kernel: str | None = None,
) -> Callable[[], Tensor]:
    blocks = -(-shape.K // cpu.BLOCK)
    width = blocks * cpu.BLOCK
    words = torch.randint(
        -(2**31), 2**31, (shape.N, width // 8), generator=generator, dtype=torch.int64
    ).to(torch.int32)
    scales = (shape.N,) if shape.group is None else (shape.N, width // shape.group)
    layers = [
        cpu.PackedLinear(
            words,
            torch.full(scales, 0.01),
            columns=shape.K,
            group=shape.group,
            transform=torch.randn((blocks, cpu.BLOCK, cpu.BLOCK), generator=generator).bfloat16(),
            path=kernel,
        )
        for _ in range(_copies(shape.N * width / 2, cold_bytes))
    ]
    scale = torch.tensor(0.5) if shape.static else None
    turn = cycle(layers)
    return lambda: next(turn)(rows, scale, threads)


def _float(shape: Shape, rows: Tensor, cold_bytes: int) -> Callable[[], Tensor]:
    weights = [
        torch.full((shape.N, shape.K), 0.01)
        for _ in range(_copies(4 * shape.N * shape.K, cold_bytes))
    ]
    turn = cycle(weights)
    return lambda: nn.functional.linear(rows, next(turn))


def _int8_dynamic(shape: Shape, rows: Tensor, cold_bytes: int) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        weight = torch.quantize_per_tensor(
            torch.rand((shape.N, shape.K)) - 0.5, 0.01, 0, torch.qint8
        )
        packed = [
            torch.ops.quantized.linear_prepack(weight, None)
            for _ in range(_copies(shape.N * shape.K, cold_bytes))
        ]
    turn = cycle(packed)
    return lambda: torch.ops.quantized.linear_dynamic(rows, next(turn))
