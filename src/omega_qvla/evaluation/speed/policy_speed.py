"""How fast a policy gives one action chunk, and what memory that takes.

Full precision and W4A4 are the same engine on the same graph; what differs is the linears.  Each
precision has a fresh process of its own, so that its peak resident memory is its own, and the
processes take turns: while one computes a chunk the others sleep.

A chunk is split where the graph is: vision (images to tokens), prefix (tokens through the backbone,
to all that denoising reads of them) and denoising (all steps of the action head).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import OmegaError, PolicyError, RecipeError, ResourceError
from omega_qvla.evaluation.chunk_reads import chunk_reads
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime.engine import kernels_of
from omega_qvla.runtime.load import load
from omega_qvla.threads import check_threads

PARTS = ("vision_ms", "prefix_ms", "denoise_ms", "total_ms")


@dataclass(frozen=True)
class Subject:
    """One row to be: a policy in one precision.

    Attributes:
        policy: what the row calls it.
        precision: ``fp32`` or ``w4a4``.
        source: a policy's name or directory, or an artifact's directory.
        threads: of torch and of the integer kernels.
        kernel: for artifacts, a kernel by name; None takes the best.
    """

    policy: str
    precision: str
    source: str
    threads: int
    kernel: str | None = None


def measure_policies(
    subjects: Sequence[Subject],
    *,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[dict[str, Any]]:
    """One row per subject (keys: docs/json.md).

    Raises:
        RecipeError: fewer than one round.
        OmegaError: whatever loading a subject raises, with its message.
    """
    if rounds < 1:
        raise RecipeError(f"rounds={rounds}: at least one is needed to measure anything")
    for subject in subjects:
        check_threads(subject.threads)
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for done, subject in enumerate(subjects):  # one after the other: loading is measured too
            progress("loading", done, len(subjects))
            workers.append(stack.enter_context(_Worker(context, subject)))
            workers[-1].ready()
        times: list[list[dict[str, float]]] = [[] for _ in workers]
        for number in range(rounds + 1):  # the first round warms up
            progress("measuring", number, rounds + 1)
            for worker, found in zip(workers, times, strict=True):
                found.append(worker.chunk())
        return [worker.finish(found[1:]) for worker, found in zip(workers, times, strict=True)]


class _Worker:
    """A process that holds one subject and computes a chunk when told to."""

    def __init__(self, context: Any, subject: Subject) -> None:
        self.subject = subject
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, subject), daemon=True)

    def __enter__(self) -> _Worker:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def ready(self) -> None:
        self._loaded = self._receive()

    def chunk(self) -> dict[str, float]:
        self._ours.send("chunk")
        return self._receive()

    def finish(self, times: Sequence[dict[str, float]]) -> dict[str, Any]:
        self._ours.send("finish")
        memory = self._receive()
        parts = {part: median(entry[part] for entry in times) for part in PARTS}
        return {**asdict(self.subject), **parts, "rounds": len(times), **self._loaded, **memory}

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._ours.recv()
        except EOFError as error:
            raise ResourceError(
                f"the process that measured {self.subject.source} in {self.subject.precision} "
                "ended without a word; most likely the system was out of memory"
            ) from error
        if "error" in answer:
            scarce = answer["exit_status"] == ResourceError.exit_status
            raise (ResourceError if scarce else PolicyError)(answer["error"])
        return answer


def _serve(connection: Connection, subject: Subject) -> None:
    torch.set_num_threads(subject.threads)
    try:
        _read_once(Path(subject.source))
        begin = perf_counter()
        policy = _load(subject)
        loaded = perf_counter() - begin
        connection.send({"load_s": loaded, **_sizes(policy, subject)})
        observation = _observation(policy)
        while connection.recv() == "chunk":
            connection.send(time_chunk(policy, observation))
        connection.send({"peak_rss_bytes": _peak_resident()})
    except OmegaError as error:
        connection.send({"error": str(error), "exit_status": error.exit_status})
    except MemoryError:
        connection.send({"error": "out of memory", "exit_status": ResourceError.exit_status})
    except Exception as error:  # it must not look like a process that was killed
        text = f"measuring {subject.source} failed: {type(error).__name__}: {error}"
        connection.send({"error": text, "exit_status": OmegaError.exit_status})


def _read_once(directory: Path) -> None:
    """Bring a directory's files into the page cache, from where loading is measured.

    Another subject's memory may have pushed them out.
    """
    for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def _load(subject: Subject) -> NativePolicy:
    if subject.precision == "fp32":
        return load_policy(subject.source)
    policy = load(subject.source, kernel=subject.kernel, threads=subject.threads).policy
    if not isinstance(policy, NativePolicy):
        raise PolicyError(
            f"{subject.source} was made from a module of your own; only policies of this project "
            "are measured"
        )
    return policy


def _observation(policy: NativePolicy) -> dict[str, Any]:
    config = policy.config
    size = config.vision.image_size
    (observation,) = Observations.random(config.cameras, config.state_dim, count=1, size=size)
    return dict(observation)


@torch.inference_mode()
def time_chunk(policy: NativePolicy, observation: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the parts of one chunk, observation to actions."""
    begin = perf_counter()
    encoded = policy.encode_images(policy.processor.encode(observation))
    looked = perf_counter()
    observed = policy.prefill(encoded)
    filled = perf_counter()
    noise = torch.zeros((1, *policy.noise_shape))
    chunk = policy.denoise(observed, noise, policy.steps)
    policy.processor.decode(chunk[0], policy.processor.anchor(observation))
    end = perf_counter()
    parts = (looked - begin, filled - looked, end - filled, end - begin)
    return dict(zip(PARTS, (1e3 * part for part in parts), strict=True))


def _sizes(policy: NativePolicy, subject: Subject) -> dict[str, Any]:
    module = policy.module
    times, tokens = chunk_reads(policy, _observation(policy))
    read = sum(
        times[path] * tensor.nbytes
        for path, child in module.named_modules()
        for tensor in held_tensors(child)
    )
    kernel = "torch" if subject.precision == "fp32" else kernels_of(module)
    return {
        "kernel": kernel,
        "weight_bytes_read": round(read),
        "checkpoint_bytes": _checkpoint_bytes(policy, subject.source),
        "prefix_tokens": tokens,
        "horizon": policy.config.horizon,
        "steps": policy.steps,
    }


def held_tensors(child: nn.Module) -> list[torch.Tensor]:
    """Tensors a module itself holds and reads; integer linears keep theirs outside of buffers."""
    held = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
    packed = getattr(child, "packed_tensors", None)
    return held if packed is None else [*held, *packed()]


def _checkpoint_bytes(policy: NativePolicy, source: str) -> int:
    directory = Path(source)
    if directory.is_dir():
        return directory_bytes(directory)
    stored = sum(p.numel() for p in policy.module.parameters()) + policy.dropped_parameters
    return 2 * stored  # as the published bf16 checkpoint would be


def _peak_resident() -> int | None:
    """High-water mark of this process's resident memory; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
