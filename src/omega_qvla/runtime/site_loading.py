"""One site of an artifact back to life: its tensors, each held against recipe and policy.

What a site must have follows from its scheme alone: a transform if the scheme has one, scales per
group if its weights have groups, a table of offsets if its activations are centred.  So nothing in
the file decides what is read, only whether it is what was expected (docs/artifact.md has the
table).  The one shape the file may choose is the number of flow times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from omega_qvla.artifact.packing import packed_width
from omega_qvla.errors import ArtifactError
from omega_qvla.policies.base import Policy, linears_of
from omega_qvla.quantization.low_rank import branch_rank
from omega_qvla.quantization.transforms import padded_width
from omega_qvla.recipe import Recipe, Scheme
from omega_qvla.runtime.description import SiteRecord
from omega_qvla.runtime.linear import GpuRun, QuantizedLinear


@dataclass(frozen=True)
class Run:
    """How the linears of a policy multiply."""

    kernel: str | None
    threads: int | None
    gpu: GpuRun | None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else self.gpu.gpu.device


class _Transform(TypedDict):
    transform: Tensor | None
    permutation: Tensor | None


class _Weight(TypedDict):
    weight_packed: Tensor
    weight_scale: Tensor
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None


class _Activations(TypedDict):
    activation_step_times: Tensor | None
    activation_scale: Tensor | None
    activation_offset: Tensor | None
    bias: Tensor | None


def load_site(
    record: SiteRecord,
    recipe: Recipe,
    tensors: dict[str, Tensor],
    policy: Policy,
    run: Run,
) -> QuantizedLinear:
    """The module of one site, from exactly the tensors that its recipe and the policy imply.

    Args:
        record: what ``omega_config.json`` says of the site.
        recipe: gives the site's scheme.
        tensors: of the whole artifact, by full name; those of this site are taken out.
        policy: gives the shapes of the linears and the clock.
        run: what multiplies.

    Raises:
        ArtifactError: a tensor is missing, misshaped or impossible; names it.
    """
    name, scheme = record.site.name, recipe.scheme_of(record.site)
    linears = linears_of(policy.module, record.site)
    widths = {linear.in_features for linear in linears}
    splits = tuple(linear.out_features for linear in linears)
    if scheme is None or widths != {record.in_features} or splits != record.splits:
        raise ArtifactError(
            f"site {name!r}: the policy has {splits} outputs of {sorted(widths)} inputs, "
            f"omega_config.json has {record.splits} of {record.in_features}"
        )
    own = _SiteTensors(name, tensors)
    width, outputs = record.in_features, sum(splits)
    if not scheme.transform.identity:
        width = padded_width(width, scheme.transform.block)
    static = _activation_scale(record, scheme) == "per_step"
    biased = any(linear.bias is not None for linear in linears)
    return QuantizedLinear(
        in_features=record.in_features,
        splits=record.splits,
        activation_bits=scheme.activations.bits,
        activation_clip=_activation_clip(record, scheme),
        group=scheme.weights.group,
        clock=policy.clock,
        kernel=run.kernel,
        threads=run.threads,
        gpu=run.gpu,
        **_transform(own, scheme, width),
        **_weight(own, scheme, record.in_features, outputs, width),
        **_activations(own, scheme, static, biased, outputs, width),
    )


class _SiteTensors:
    """The tensors of an artifact whose names begin with a site's, taken out one by one."""

    def __init__(self, site: str, tensors: dict[str, Tensor]) -> None:
        self._site, self._tensors = site, tensors

    def take(self, kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
        full = self.full(kind)
        if full not in self._tensors:
            raise ArtifactError(f"tensor {full} is missing")
        return require(full, self._tensors.pop(full), dtype, shape)

    def length(self, kind: str) -> int:
        """Elements of a tensor that may be missing."""
        known = self._tensors.get(self.full(kind))
        return 0 if known is None else known.numel()

    def full(self, kind: str) -> str:
        return f"{self._site}.{kind}"


def _transform(own: _SiteTensors, scheme: Scheme, width: int) -> _Transform:
    """``transform`` and ``permutation``, each only where the scheme has one."""
    transform = permutation = None
    if not scheme.transform.identity:
        block = scheme.transform.block
        transform = own.take("transform", torch.bfloat16, width // block, block, block)
    if scheme.transform.permutation != "none":
        permutation = own.take("permutation", torch.int32, width)
        ordered = torch.arange(width, dtype=torch.int32, device=permutation.device)
        if not torch.equal(permutation.sort().values, ordered):
            full = own.full("permutation")
            raise ArtifactError(f"{full} is not a permutation of {width} channels")
    return {"transform": transform, "permutation": permutation}


def _weight(
    own: _SiteTensors, scheme: Scheme, in_features: int, outputs: int, width: int
) -> _Weight:
    """Packed integers, their scales, and the 16-bit branch where the scheme has one."""
    if scheme.weights.bits == 4:
        packed = own.take("weight_packed", torch.int32, outputs, packed_width(width))
    else:
        packed = own.take("weight_packed", torch.int8, outputs, width)
    group = scheme.weights.group
    scales = (outputs,) if group is None else (outputs, -(-width // group))
    scale = own.take("weight_scale", torch.float32, *scales)
    shape = own.take("weight_shape", torch.int64, 2)
    if shape.tolist() != [outputs, in_features]:
        raise ArtifactError(
            f"{own.full('weight_shape')} is {shape.tolist()}, expected {[outputs, in_features]}"
        )
    down = up = None
    if scheme.weights.low_rank is not None:
        rank = branch_rank(scheme.weights.low_rank, outputs, in_features)
        down = own.take("low_rank_down", torch.bfloat16, rank, in_features)
        up = own.take("low_rank_up", torch.bfloat16, outputs, rank)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "low_rank_down": down,
        "low_rank_up": up,
    }


def _activations(
    own: _SiteTensors, scheme: Scheme, static: bool, biased: bool, outputs: int, width: int
) -> _Activations:
    """Scales and offsets per flow time, and the bias, which offsets make one per flow time too."""
    centred = scheme.activations.centred
    times = scale = offset = bias = None
    if static or centred:
        steps = own.length("activation_step_times")
        times = own.take("activation_step_times", torch.float32, steps)
        if steps == 0 or bool((times.diff() >= 0).any()):
            full = own.full("activation_step_times")
            raise ArtifactError(f"{full} must be descending flow times")
        if static:
            scale = own.take("activation_scale", torch.float32, steps)
            if not bool((scale > 0).all()):
                raise ArtifactError(f"{own.full('activation_scale')} must be positive")
        if centred:
            offset = own.take("activation_offset", torch.bfloat16, steps, width)
            bias = own.take("bias", torch.float32, steps, outputs)
    if biased and not centred:
        bias = own.take("bias", torch.float32, outputs)
    return {
        "activation_step_times": times,
        "activation_scale": scale,
        "activation_offset": offset,
        "bias": bias,
    }


def _activation_scale(record: SiteRecord, scheme: Scheme) -> str:
    """How a site's activations are scaled; the record says where the recipe leaves a choice."""
    asked, stored = scheme.activations.scale, record.activation_scale
    possible = ("per_step", "per_token") if asked == "per_step_or_token" else (asked,)
    if stored not in possible:
        raise ArtifactError(
            f"site {record.site.name!r}: omega_config.json has activation_scale {stored!r}, its "
            f"recipe {asked!r}"
        )
    return stored


def _activation_clip(record: SiteRecord, scheme: Scheme) -> float:
    """The share of a token's largest magnitude; the record has it where it was searched."""
    asked, stored = scheme.activations.clip, record.activation_clip
    if asked != "search" and stored is None:
        return asked
    if asked != "search" or not isinstance(stored, float) or not 0.0 < stored <= 1.0:
        raise ArtifactError(
            f"site {record.site.name!r}: omega_config.json has activation_clip {stored!r}, its "
            f"recipe clip {asked!r}"
        )
    return stored


def require(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor, which must be of this type and shape.

    Raises:
        ArtifactError: it is of another; gives both.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ArtifactError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
        )
    return tensor
