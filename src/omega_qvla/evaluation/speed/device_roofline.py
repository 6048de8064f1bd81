"""The least time a chunk can take on a device, by arithmetic from published figures.

For each part of a chunk (vision, prefix, denoising) the work is counted: bytes of weight that have
to come from memory, multiply-adds of quantized linears, and all other multiply-adds.  A part takes
at least

    max(bytes / bandwidth,  integer multiply-adds / int8 peak + the others / bfloat16 peak),

and the chunk the sum of its parts.  Multiply-adds are counted while the network runs on PyTorch's
device without memory (``meta``); bytes are those an artifact stores, or a recipe would.

This is a calculation and a bound, not a measurement: no kernel reaches either peak, and
activations, keys and values, launches and norms are counted as free.  4-bit integers are multiplied
as int8 ones, as the GPU kernels do; what 4 bits save is memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import TorchFunctionMode

from omega_qvla.artifact import read_description
from omega_qvla.artifact.layout import Layout, TensorSpec
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.chunk_reads import chunk_reads, counted_calls, weight_reads
from omega_qvla.policies.adaptive_norms import AdaptiveNorms
from omega_qvla.policies.base import Observation, sites_of
from omega_qvla.policies.full_precision import policy_skeleton, stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.runtime.prediction import site_bytes

PARTS: tuple[str, ...] = ("vision", "prefix", "denoise")
_BF16_BYTES = 2


@dataclass(frozen=True)
class Device:
    """Published figures of a device, dense, without sparsity.

    Attributes:
        title: what it is called.
        memory_gbytes: 10⁹ bytes a second.
        int8_tops, bf16_tflops: 10¹² operations a second, a multiply-add being two.
        source: where the figures are from.
    """

    title: str
    memory_gbytes: float
    int8_tops: float
    bf16_tflops: float
    source: str


DEVICES: Mapping[str, Device] = {
    "orin": Device(
        "Jetson AGX Orin 64GB",
        204.8,
        85.0,
        42.5,
        "NVIDIA Jetson AGX Orin Series Technical Brief: GPU 170 sparse INT8 TOPS, halved; FP16 at "
        "half of that. Its two DLAs (105 sparse TOPS) are not counted: these kernels do not run "
        "there",
    ),
    "thor": Device(
        "Jetson AGX Thor (T5000)",
        273.0,
        517.0,
        258.0,
        "NVIDIA Jetson Thor product page: 2070 sparse FP4 TFLOPS, halved per step FP4, FP8, FP16 "
        "and for density; INT8 taken as FP8, which is not published apart",
    ),
    "4090": Device(
        "GeForce RTX 4090",
        1008.0,
        660.6,
        165.2,
        "NVIDIA Ada GPU architecture white paper, appendix A; BF16 with FP32 sums",
    ),
    "h200": Device(
        "H200 SXM",
        4800.0,
        1979.0,
        989.5,
        "NVIDIA H200 data sheet, figures with sparsity halved",
    ),
}


@dataclass
class Counted:
    """What one part of a chunk computes.

    Attributes:
        linears: multiply-adds by path of the linear.
        others: attention, convolutions and whatever else multiplies matrices.
        called: how often each module was called, by path.
    """

    linears: dict[str, int] = field(default_factory=dict)
    others: int = 0
    called: Counter[str] = field(default_factory=Counter)


class _Counter(TorchFunctionMode):
    """Counts the multiply-adds of matrix products as they are called."""

    def __init__(self, counted: Counted, paths: Mapping[int, str]) -> None:
        super().__init__()
        self._counted, self._paths = counted, paths

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight = args[0], args[1]
            path = self._paths.get(id(weight), "")
            macs = x.numel() // weight.shape[1] * weight.numel()
            self._counted.linears[path] = self._counted.linears.get(path, 0) + macs
        elif func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            widths = query.shape[-1] + value.shape[-1]
            self._counted.others += math.prod(query.shape[:-1]) * key.shape[-2] * widths
        elif func is F.conv2d:
            self._counted.others += result.numel() * args[1][0].numel()
        elif getattr(func, "__name__", "") in ("matmul", "__matmul__", "__rmatmul__", "bmm"):
            self._counted.others += args[0].numel() * args[1].shape[-1]
        return result


def count(policy: NativePolicy, observation: Observation) -> dict[str, Counted]:
    """What the parts of a chunk compute, by part.

    Args:
        policy: full precision, its module on the meta device.
        observation: how many tokens there are depends on its prompt.
    """
    noise = torch.zeros((1, *policy.noise_shape), device=policy.device)
    found = {part: Counted() for part in PARTS}
    with torch.inference_mode():
        policy.schedule(policy.steps)  # depends on the flow time alone: computed once, ahead
        with _counting(policy.module, found["vision"]):
            encoded = policy.encode_images(policy.processor.encode(observation))
        with _counting(policy.module, found["prefix"]):
            observed = policy.prefill(encoded)
        with _counting(policy.module, found["denoise"]):
            policy.denoise(observed, noise, policy.steps)
    return found


@contextmanager
def _counting(module: nn.Module, counted: Counted) -> Iterator[None]:
    paths = {
        id(child.weight): path
        for path, child in module.named_modules()
        if isinstance(child, nn.Linear)
    }

    with counted_calls(module) as called, _Counter(counted, paths):
        yield
    counted.called = called


@dataclass(frozen=True)
class Stored:
    """A policy in one precision: what its weights take.

    Attributes:
        precision: ``bf16`` or ``w4a4``.
        held: bytes that one call reads, by path of the module that does; a fused site's by its
            first linear.  Of scales, offsets and biases per denoising step that is one row.
        quantized: paths of the linears that multiply integers.
    """

    precision: str
    held: Mapping[str, int]
    quantized: frozenset[str]


def in_bf16(policy: NativePolicy) -> Stored:
    """Every parameter in 16 bits."""
    held: dict[str, int] = {}
    for name, parameter in policy.module.named_parameters():
        path = name.rpartition(".")[0]
        held[path] = held.get(path, 0) + _BF16_BYTES * parameter.numel()
    return Stored("bf16", held, frozenset())


def predicted(policy: NativePolicy, recipe: Recipe) -> Stored:
    """What quantizing with a recipe would store (an embedding's bits are moot: it is looked up)."""
    sizes = site_bytes(policy, recipe, steps=1)
    sites = [site for site in sites_of(policy) if site.name in sizes]
    quantized = frozenset(path for site in sites for path in site.linears)
    rest = {path: size for path, size in in_bf16(policy).held.items() if path not in quantized}
    return Stored("w4a4", rest | {site.linears[0]: sizes[site.name] for site in sites}, quantized)


def _in_artifact(config: Mapping[str, Any], tensors: Layout) -> Stored:
    sites = {str(site["name"]): [str(path) for path in site["linears"]] for site in config["sites"]}
    held: dict[str, int] = {}
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        path = sites[owner][0] if owner in sites else owner
        held[path] = held.get(path, 0) + tensor.nbytes // _rows_of_steps(name, tensor)
    return Stored("w4a4", held, frozenset(path for paths in sites.values() for path in paths))


def _rows_of_steps(name: str, tensor: TensorSpec) -> int:
    """How many denoising steps a tensor has values for; 1 where they are the same in all."""
    kind = name.rpartition(".")[2]
    per_step = kind.startswith("activation_") or (kind == "bias" and len(tensor.shape) == 2)
    return tensor.shape[0] if per_step else 1


def artifact_structure(directory: Path) -> tuple[NativePolicy, Stored]:
    """An artifact's network without tensors, and what its tensors take.

    Raises:
        ArtifactError: it cannot be read.
        PolicyError: it was made from a module of the user's own.
    """
    artifact = read_description(directory)
    family = str(artifact.config["policy"]["family"])
    if family == TorchPolicy.family:
        raise PolicyError(
            f"{directory} was made from a module of your own; the roofline is calculated for the "
            "policies of this project"
        )
    policy = policy_skeleton(family, artifact.config["policy"]["config"], artifact.processor)
    return policy, _in_artifact(artifact.config, artifact.manifest.layout)


def bytes_read(
    policy: NativePolicy, stored: Stored, counted: Mapping[str, Counted]
) -> dict[str, float]:
    """Bytes of weight read per part of one chunk."""
    found: dict[str, float] = {}
    for part in PARTS:
        times = weight_reads(policy.module, counted[part].called)
        found[part] = sum(times.get(path, 0.0) * size for path, size in stored.held.items())
    if isinstance(policy, AdaptiveNorms):  # scale, shift and gate of the norms, float32
        found["denoise"] += policy.steps * math.prod(policy.modulation_shape) * 4
    return found


def roofline_row(
    name: str,
    device: Device,
    policy: NativePolicy,
    stored: Stored,
    counted: Mapping[str, Counted],
) -> dict[str, Any]:
    """One row of ``bench policy --roofline`` (keys: docs/json.md)."""
    read = bytes_read(policy, stored, counted)
    row: dict[str, Any] = {"policy": name, "precision": stored.precision}
    bounds: dict[str, str] = {}
    integers = floats = 0
    for part in PARTS:
        linears = counted[part].linears
        whole = sum(macs for path, macs in linears.items() if path in stored.quantized)
        other = sum(linears.values()) - whole + counted[part].others
        memory = 1e3 * read[part] / (1e9 * device.memory_gbytes)
        compute = 2e3 * (whole / device.int8_tops + other / device.bf16_tflops) / 1e12
        row[f"{part}_ms"] = max(memory, compute)
        bounds[part] = "memory" if memory > compute else "compute"
        integers, floats = integers + whole, floats + other
    return {
        **row,
        "total_ms": sum(row[f"{part}_ms"] for part in PARTS),
        "bound_by": bounds,
        "weight_bytes_read": round(sum(read.values())),
        "integer_gmacs": integers / 1e9,
        "float_gmacs": floats / 1e9,
    }


def roofline(
    device: str, *, policy: str, artifact: Path | None = None, recipe: str = DEFAULT_RECIPE
) -> dict[str, Any]:
    """The bound of one policy on one device, in bfloat16 and in W4A4.

    Args:
        device: a key of ``DEVICES``.
        policy: full precision; only its structure is used.  Ignored where there is an artifact.
        artifact: gives structure and bytes; without one ``recipe`` predicts them.

    Raises:
        PolicyError: unknown policy, or a module of the user's own.
        ArtifactError: the artifact cannot be read.
    """
    chosen = DEVICES[device]
    if artifact is None:
        name, structure = policy, stream_policy(policy)
        structure.module.to("meta")
        stored = predicted(structure, Recipe.load(recipe))
    else:
        name = str(artifact)
        structure, stored = artifact_structure(artifact)
    config = structure.config
    size = config.vision.image_size
    (observation,) = Observations.random(config.cameras, config.state_dim, count=1, size=size)
    counted = count(structure, observation)
    rows = [
        roofline_row(name, chosen, structure, kind, counted)
        for kind in (in_bf16(structure), stored)
    ]
    return {
        "calculation": True,
        "device": {"key": device, **asdict(chosen)},
        "weights": "stored" if artifact is not None else f"predicted for {recipe}",
        "prefix_tokens": chunk_reads(structure, observation)[1],
        "horizon": config.horizon,
        "steps": structure.steps,
        "rows": rows,
    }
