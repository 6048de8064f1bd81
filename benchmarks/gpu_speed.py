"""The GPU kernels and policies timed on the GPU at hand; ``benchmarks/gpu.py`` runs it.

A layer is timed as it runs inside a graph: a number of calls are captured together, each on a
weight of its own or all on one, and replayed, so that neither Python nor the driver is measured.
Weights of their own exceed the L2 cache several times (*cold*: what a policy sees); one weight may
stay in it (*warm*).  Peers take turns, CUDA events time each replay, medians are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from gpu_checks import MismatchError
from torch import Tensor, nn

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.speed.kernel_speed import Shape
from omega_qvla.evaluation.speed.policy_speed import PARTS, held_tensors
from omega_qvla.policies.native import NativePolicy, Pass
from omega_qvla.runtime.graph import Capturing, use_graphs
from omega_qvla.runtime.kernels import triton as gpu
from omega_qvla.runtime.kernels.triton_layout import BLOCK
from omega_qvla.runtime.kernels.triton_tuning import Tuner
from omega_qvla.runtime.loading import load

BF16 = "cuBLAS bf16"
_L2_TIMES = 4
_MOST_COPIES = 64


def measure_shape(
    shape: Shape, device: str, *, tuner: Tuner | None, rounds: int, l2_bytes: int
) -> list[dict[str, Any]]:
    """Rows of one layer: ours and cuBLAS in bfloat16, weights cold and warm (docs/json.md)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((shape.M, shape.K), generator=generator).to(device, torch.bfloat16)
    copies = min(_MOST_COPIES, _L2_TIMES * l2_bytes // (shape.N * shape.K // 2) + 2)
    ours = _ours(shape, rows, device, copies, tuner, generator)
    theirs = _cublas(shape, rows, copies)
    ours[0]()  # chooses a tiling, which cannot be measured while a graph is captured
    found: list[dict[str, Any]] = []
    for cold in (True, False):
        graphs = {
            name: _capture(calls if cold else calls[:1] * copies)
            for name, calls in ((gpu.NAME, ours), (BF16, theirs))
        }
        seconds = {name: value / copies for name, value in _turns(graphs, rounds).items()}
        macs = shape.M * shape.N * shape.K
        found += [
            {
                "site": shape.site,
                "M": shape.M,
                "N": shape.N,
                "K": shape.K,
                "group": shape.group,
                "activation": "static" if shape.static else "per_token",
                "kernel": name,
                "weights_in_cache": not cold,
                "median_us": 1e6 * value,
                "gmacs": macs / value / 1e9,
                "vs_bf16": seconds[BF16] / value,
                "rounds": rounds,
            }
            for name, value in seconds.items()
        ]
    return found


def _ours(
    shape: Shape,
    rows: Tensor,
    device: str,
    copies: int,
    tuner: Tuner | None,
    generator: torch.Generator,
) -> list[Callable[[], Tensor]]:
    blocks = -(-shape.K // BLOCK)
    width = blocks * BLOCK
    words = torch.randint(
        -(2**31), 2**31, (shape.N, width // 8), generator=generator, dtype=torch.int64
    ).to(torch.int32)
    scales = (shape.N,) if shape.group is None else (shape.N, blocks)
    transform = torch.randn((blocks, BLOCK, BLOCK), generator=generator).bfloat16()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    layers = [
        gpu.PackedLinear(
            words.to(device),
            torch.full(scales, 0.01, device=device),
            columns=shape.K,
            group=shape.group,
            transform=transform.to(device),
            processors=processors,
            tuner=tuner,
        )
        for _ in range(copies)
    ]
    scale = torch.tensor(0.5, device=device) if shape.static else None
    return [lambda layer=layer: layer(rows, scale) for layer in layers]


def _cublas(shape: Shape, rows: Tensor, copies: int) -> list[Callable[[], Tensor]]:
    weights = [
        torch.full((shape.N, shape.K), 0.01, device=rows.device, dtype=torch.bfloat16)
        for _ in range(copies)
    ]
    return [lambda weight=weight: nn.functional.linear(rows, weight) for weight in weights]


def _capture(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """All calls as one graph, warmed up on a stream of their own as capturing wants."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds by name, by CUDA events, the calls taking turns."""
    pairs: dict[str, list[list[torch.cuda.Event]]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            if number >= 2:
                pairs[name].append([begin, end])
    torch.cuda.synchronize()
    return {
        name: 1e-3 * median(begin.elapsed_time(end) for begin, end in found)
        for name, found in pairs.items()
    }


def measure_peaks(device: str) -> dict[str, float]:
    """What this GPU was seen to do: int8 multiply-adds and bytes from memory, 10⁹ a second."""
    side = 8192
    left = torch.ones((side, side), dtype=torch.int8, device=device)
    right = left.t()
    product = _turns({"x": lambda: torch._int_mm(left, right)}, 5)["x"]  # pyright: ignore[reportPrivateImportUsage]
    array = torch.ones(1 << 30, dtype=torch.int8, device=device).view(torch.float32)
    copied = torch.empty_like(array)
    moved = _turns({"x": lambda: copied.copy_(array)}, 5)["x"]
    return {"int8_gmacs": side**3 / product / 1e9, "memory_gbytes": 2 * array.nbytes / moved / 1e9}


def measure_policy(
    source: Path, device: str, *, tuning: Path | None, rounds: int
) -> dict[str, Any]:
    """One artifact on the GPU: load time, memory, and a chunk and its parts without any graph."""
    torch.cuda.reset_peak_memory_stats(device)
    begin = perf_counter()
    loaded = load(source, device=device, tuning=tuning, graph=False)
    torch.cuda.synchronize()
    load_seconds, resident = perf_counter() - begin, torch.cuda.memory_allocated(device)
    policy = _native(loaded.policy, source)
    observation = random_observation(policy)
    times = [time_chunk(policy, observation) for _ in range(rounds + 2)][2:]
    return {
        "precision": "w4a4",
        "kernel": loaded.kernel,
        "graph": False,
        **{part: median(entry[part] for entry in times) for part in PARTS},
        "rounds": rounds,
        "load_s": load_seconds,
        "gpu_bytes_resident": resident,
        "gpu_bytes_peak": torch.cuda.max_memory_allocated(device),
    }


def measure_chunks(
    name: str, subjects: Mapping[str, Subject], observation: Mapping[str, Any], *, rounds: int
) -> list[dict[str, Any]]:
    """Rows of whole chunks, all subjects taking turns (docs/json.md).

    A subject is first run twice, so that what it compiles or captures is not timed; the most memory
    held meanwhile is its own peak.

    Args:
        name: of the policy, for the rows.
        subjects: by name; they are in memory together.
        observation: what all of them are given.
        rounds: timed chunks of each.
    """
    peaks: dict[str, int | None] = {}
    for key, subject in subjects.items():
        _forget_peak(subject.policy)
        for _ in range(2):
            time_whole_chunk(subject, observation)
        peaks[key] = _peak(subject.policy)
    times: dict[str, list[float]] = {key: [] for key in subjects}
    for _ in range(rounds):
        for key, subject in subjects.items():
            times[key].append(time_whole_chunk(subject, observation))
    return [
        {
            "policy": name,
            "subject": key,
            "chunk_ms": median(times[key]),
            "rounds": rounds,
            "weight_bytes": tensor_bytes(subject.policy),
            "gpu_bytes_peak_all_held": peaks[key],
        }
        for key, subject in subjects.items()
    ]


@dataclass(frozen=True)
class Subject:
    """A policy and one way to compute its chunks.

    Attributes:
        policy: what it is.
        run: its pass, or a graph or a compilation of it.
    """

    policy: NativePolicy
    run: Pass


def with_and_without_graph(
    name: str, policy: NativePolicy, run: Pass, backend: Capturing | None = None
) -> dict[str, Subject]:
    """The two subjects a pass makes."""
    graphs = use_graphs(policy, compute=run, backend=backend)
    return {
        f"{name} eager": Subject(policy, run),
        f"{name} graph": Subject(policy, graphs),
    }


def compiled(policy: NativePolicy, run: Pass) -> Subject:
    """The pass as PyTorch's compiler makes it, tuned as far as it goes, with graphs of its own."""
    fast = torch.compile(run, mode="max-autotune")

    def alone(inputs: Sequence[Tensor], noise: Tensor, steps: int) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(inputs, noise, steps).clone()

    return Subject(policy, alone)


def tensor_bytes(policy: NativePolicy) -> int:
    """Parameters, buffers and what kernels hold in layouts of their own."""
    held = {id(t): t for child in policy.module.modules() for t in held_tensors(child)}
    return sum(tensor.nbytes for tensor in held.values())


@torch.inference_mode()
def time_whole_chunk(subject: Subject, observation: Mapping[str, Any]) -> float:
    """Milliseconds from encoded inputs to a chunk in the robot's units, the GPU waited for."""
    policy = subject.policy
    inputs = policy.processor.encode(observation)
    noise = torch.zeros((1, *policy.noise_shape), device=policy.device)
    begin = _now(policy)
    chunk = subject.run(inputs, noise, policy.steps)[0]
    policy.processor.decode(chunk, policy.processor.anchor(observation))
    return 1e3 * (_now(policy) - begin)


def _forget_peak(policy: NativePolicy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)


def _peak(policy: NativePolicy) -> int | None:
    if policy.device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(policy.device)


def _native(policy: Any, source: Path) -> NativePolicy:
    if not isinstance(policy, NativePolicy):
        raise PolicyError(f"{source} was made from a module of your own; it is not measured")
    return policy


def random_observation(policy: NativePolicy) -> dict[str, Any]:
    """Noise in the shape a policy takes."""
    config = policy.config
    size = config.vision.image_size
    (found,) = Observations.random(config.cameras, config.state_dim, count=1, size=size)
    return dict(found)


@torch.inference_mode()
def time_chunk(policy: NativePolicy, observation: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the parts of one chunk by the clock on the wall, the GPU waited for."""
    noise = torch.zeros((1, *policy.noise_shape), device=policy.device)
    marks = [_now(policy)]
    encoded = policy.encode_images(policy.processor.encode(observation))
    marks.append(_now(policy))
    observed = policy.prefill(encoded)
    marks.append(_now(policy))
    chunk = policy.denoise(observed, noise, policy.steps)[0]
    policy.processor.decode(chunk, policy.processor.anchor(observation))
    marks.append(_now(policy))
    parts = [*(b - a for a, b in pairwise(marks)), marks[-1] - marks[0]]
    return dict(zip(PARTS, (1e3 * part for part in parts), strict=True))


def _now(policy: NativePolicy) -> float:
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return perf_counter()


def compare_actions(source: Path, device: str, most: float = 1e-3) -> dict[str, float]:
    """The same artifact, observation and noise on GPU and CPU.

    Integers are equal given equal inputs; norms and attention add up in another order, and a value
    between two integers may then fall to the other side.  The bound is on the relative mean squared
    difference of the chunk.

    Raises:
        MismatchError: they differ by more.
    """
    chunks = []
    for where in ("cpu", device):
        policy = _native(load(source, device=where).policy, source)
        noise = torch.randn(policy.noise_shape, generator=torch.Generator().manual_seed(0))
        chunks.append(policy.sample_normalized(random_observation(policy), noise).cpu())
    error = float((chunks[1] - chunks[0]).square().mean() / chunks[0].square().mean())
    if not error <= most:
        raise MismatchError(f"{source}: actions on GPU and CPU differ by {error:.2g} (> {most:g})")
    return {"action_error_against_cpu": error}
