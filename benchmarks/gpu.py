"""Everything there is to say about the GPU at hand, in ten minutes: ``make bench-gpu``.

Parts run one after the other in processes of their own, each with a limit and all together with
another, so that one that fails or hangs takes nothing with it: kernels against the reference,
actions against the CPU, quantizing against the CPU, full-size pi0.5 in W4A4 and bfloat16, each with
and without a graph, quantizing it, kernels against cuBLAS in bfloat16, GR00T N1.5 as pi0.5, and
bfloat16 as PyTorch compiles it.  What a part had found by then is kept, and the file says which
parts did not finish, and why.  No network is used.

Written: ``gpu-NAME.json`` and ``gpu-NAME.png`` in the folder given (benchmarks/results by default).
Exit status: 0 done; 1 a check failed or a part did not finish; 3 there is no GPU.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

import gpu_checks
import gpu_quantizing
import gpu_speed
import torch
from random_artifact import random_artifact

from omega_qvla.devices import EXPERIMENTAL
from omega_qvla.errors import OmegaError, ResourceError
from omega_qvla.evaluation.speed.kernel_speed import SHAPES
from omega_qvla.files import write_json
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.report.roofline import roofline_figure
from omega_qvla.runtime.bfloat16 import bfloat16_pass, in_bfloat16
from omega_qvla.runtime.kernels import triton_gpu as gpu
from omega_qvla.runtime.load import load

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda"
Send = Callable[[str, Any], None]


@dataclass(frozen=True)
class Part:
    """One part: what it does, and how many seconds it may take."""

    name: str
    run: Callable[[Send, Path], None]
    seconds: float


def layers(send: Send, _: Path) -> None:
    """Kernels against the reference, bit for bit, and what is between them against float64."""
    generator = torch.Generator().manual_seed(0)
    send("checks", gpu_checks.check_layers(DEVICE, generator))
    send("checks", gpu_checks.check_elementwise(DEVICE, generator))


def actions(send: Send, folder: Path) -> None:
    """Action chunks against those of the processor."""
    for name in ("random:tiny-pi05", "random:tiny-gr00t"):
        source = random_artifact(name).save_pretrained(folder / name.replace(":", "-"))
        send("checks", {name: gpu_speed.compare_actions(source, DEVICE)})


def quantizing(send: Send, _: Path) -> None:
    """An embedded policy quantized here against itself quantized on the processor."""
    name = "builtin:tiny-pi05"
    for recipe in ("omega-w4a4-static", "omega-w4a4-static-cascade"):
        found = gpu_quantizing.compare_quantizing(name, DEVICE, recipe)
        send("checks", {f"{name} quantized with {recipe}": found})


def quantizing_pi05(send: Send, folder: Path) -> None:
    """Full-size pi0.5 quantized on the GPU, its weights drawn layer by layer."""
    gpu_quantizing.measure_quantizing(
        "random:pi05-libero", DEVICE, folder / "journal", lambda row: send("quantizing", row)
    )


def kernels(send: Send, folder: Path) -> None:
    """Every layer shape of the policies against cuBLAS in bfloat16."""
    found = gpu.find(DEVICE)
    peaks = gpu_speed.measure_peaks(DEVICE)
    send("memory_gbytes", peaks["memory_gbytes"])
    send("peak_gmacs", {"int8 (torch._int_mm, 8192³)": peaks["int8_gmacs"]})
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    tuner = gpu.tuner(found, folder / "tilings")
    for shape in SHAPES:
        rows = gpu_speed.measure_shape(shape, DEVICE, tuner=tuner, rounds=15, l2_bytes=l2_bytes)
        send("rows", rows)


def _measure(name: str, send: Send, folder: Path) -> None:
    """One full-size policy; its artifact is made of random integers."""
    source = random_artifact(name).save_pretrained(folder / name.replace(":", "-"))
    found = gpu_speed.measure_policy(source, DEVICE, tuning=folder / "tilings", rounds=15)
    send("policies", [{"policy": name, **found}])
    integers = load(source, device=DEVICE, tuning=folder / "tilings").policy
    assert isinstance(integers, NativePolicy)
    full = in_bfloat16(stream_policy(name), DEVICE)
    subjects = {
        **gpu_speed.with_and_without_graph("w4a4", integers, integers.compute),
        **gpu_speed.with_and_without_graph("bf16", full, bfloat16_pass(full)),
    }
    seen = gpu_speed.random_observation(full)
    send("chunks", gpu_speed.measure_chunks(name, subjects, seen, rounds=15))


def pi05(send: Send, folder: Path) -> None:
    """Full-size pi0.5, 2 cameras, horizon 10."""
    _measure("random:pi05-libero", send, folder)


def gr00t(send: Send, folder: Path) -> None:
    """Full-size GR00T N1.5, 2 cameras, one embodiment, 8 steps."""
    _measure("random:gr00t-n1.5-libero", send, folder)


def compiler(send: Send, _: Path) -> None:
    """Full-size pi0.5 in bfloat16: PyTorch's compiler against the graph."""
    name = "random:pi05-libero"
    full = in_bfloat16(stream_policy(name), DEVICE)
    run = bfloat16_pass(full)
    pair = gpu_speed.with_and_without_graph("bf16", full, run)
    subjects = {
        "bf16 torch.compile max-autotune": gpu_speed.compiled(full, run),
        "bf16 graph beside torch.compile": pair["bf16 graph"],
    }
    seen = gpu_speed.random_observation(full)
    send("chunks", gpu_speed.measure_chunks(name, subjects, seen, rounds=15))


TOTAL_SECONDS = 600
"""Of all parts together.  What one does not use, later ones may; the most wanted come first."""
_LEAST_SECONDS = 5
"""A part with less left is not begun: its process needs as long to start."""

PARTS = (
    Part("layers", layers, 50),
    Part("actions", actions, 50),
    Part("quantizing", quantizing, 50),
    Part("pi0.5", pi05, 140),
    Part("quantizing pi0.5", quantizing_pi05, 240),
    Part("kernels", kernels, 140),
    Part("gr00t", gr00t, 100),
    Part("torch.compile", compiler, 115),
)


def serve(part: Part, folder: Path, connection: Any) -> None:
    """Run a part in this process and send what it finds."""
    try:
        part.run(lambda key, value: connection.send((key, value)), folder)
        connection.send(("done", None))
    except OmegaError as error:
        connection.send(("failed", str(error)))
    except Exception as error:  # other parts go on
        connection.send(("failed", f"{type(error).__name__}: {error}"))


def run_parts(
    parts: Sequence[Part], folder: Path, document: dict[str, Any], seconds: float
) -> None:
    """Run all parts, which together may take so many seconds."""
    end = monotonic() + seconds
    for part in parts:
        left = min(part.seconds, end - monotonic())
        if left < _LEAST_SECONDS:
            document["unfinished"][part.name] = f"not begun: the {seconds:.0f} s of all were over"
            continue
        print(f"{part.name}: at most {left:.0f} s", flush=True)
        run_part(replace(part, seconds=left), folder, document)


def run_part(part: Part, folder: Path, document: dict[str, Any]) -> None:
    """Run a part in a process of its own and put what it sends into the document."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(part, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    limit = monotonic() + part.seconds
    reason = None
    try:
        while ours.poll(max(0.0, limit - monotonic())):
            key, value = ours.recv()
            if key in ("done", "failed"):
                reason = value
                break
            merge(document, key, value)
        else:
            reason = f"not finished after {part.seconds:.0f} s"
    except EOFError:
        reason = "its process ended without a word; most likely out of memory"
    process.terminate()
    process.join()
    if reason is not None:
        document["unfinished"][part.name] = reason


def merge(document: dict[str, Any], key: str, value: Any) -> None:
    """Lists grow, mappings are filled up, anything else is set."""
    if isinstance(value, list):
        document.setdefault(key, []).extend(value)
    elif isinstance(value, dict):
        document.setdefault(key, {}).update(value)
    else:
        document[key] = value


def main(results: Path) -> int:
    """Run all parts, write the results, and return the exit status."""
    try:
        found = gpu.find(DEVICE)
    except ResourceError as error:
        print(f"no GPU to measure: {error}", file=sys.stderr)
        return error.exit_status
    print(EXPERIMENTAL, flush=True)
    document: dict[str, Any] = {
        "schema": 1,
        "machine": found.name,
        "capability": ".".join(map(str, found.capability)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "library": version("omega-qvla"),
        "unfinished": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        run_parts(PARTS, Path(folder), document, TOTAL_SECONDS)
    results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", found.name.lower()).strip("-")
    target = results / f"gpu-{name}.json"
    write_json(document, target)
    print(f"results {target}")
    if document.get("rows") and "memory_gbytes" in document:
        print(f"picture {roofline_figure(target, target.with_suffix('.png'))}")
    for part, reason in document["unfinished"].items():
        print(f"{part}: {reason}", file=sys.stderr)
    return 1 if document["unfinished"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS))
