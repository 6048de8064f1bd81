"""Memory of the whole checkpoint, component by component, and the paper's narrower count.

The reference is the checkpoint the policy came from, every parameter of it, dead ones included, in
16 bits.  The paper's own figure (71.3 %) counts only the linears it quantizes; that number is
reported beside ours and labelled.  Linears that a recipe leaves in 16 bits inside a component it
quantizes count there as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla.artifact.memory import ComponentMemory, MemorySummary, summarise
from omega_qvla.artifact.packing import packed_width
from omega_qvla.policies.base import (
    PAPER_SCOPE,
    HasEmbedding,
    Policy,
    QuantizationSite,
    linears_of,
    sites_of,
)
from omega_qvla.policies.layers.step_table import HasStepTable, StepTable
from omega_qvla.quantization.low_rank import branch_rank
from omega_qvla.quantization.transforms import padded_width
from omega_qvla.recipe import Recipe, Scheme
from omega_qvla.runtime.embedding import embedding_layout

DEAD = "never read at inference"
OVERHEAD = "file headers, manifest, processor"
_REFERENCE_BYTES = 2
_STEP_TABLE_COMPONENT, _TABLE = "adaptive norms", "step_table"
_ORDER = (
    "vision",
    "projector",
    "token embedding",
    "backbone",
    _STEP_TABLE_COMPONENT,
    "action_head",
)


def reference_parameters(policy: Policy) -> dict[str, dict[str, int]]:
    """Parameters of the checkpoint by component: all of them, and the paper's linears alone."""
    counts: dict[str, int] = {}
    for name, parameter in policy.module.named_parameters():
        component = policy.component_of(name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    if policy.dropped_parameters:
        counts[DEAD] = policy.dropped_parameters
    narrow = dict.fromkeys(PAPER_SCOPE, 0)
    for site in sites_of(policy):
        if site.component in narrow:
            linears = linears_of(policy.module, site)
            narrow[site.component] += sum(linear.weight.numel() for linear in linears)
    return {"all": counts, "paper_scope": {k: v for k, v in narrow.items() if v}}


def kept_linears(policy: Policy, recipe: Recipe) -> list[str]:
    """Linears in 16 bits although their component is quantized (a selective layout)."""
    return [
        name
        for site in sites_of(policy)
        if recipe.scheme(site.component) is not None and recipe.scheme_of(site) is None
        for name in site.linears
    ]


@dataclass(frozen=True)
class WeightStorage:
    """How the weights of a policy's linears are stored.

    Attributes:
        bits_per_weight: bits stored for the weights of all sites over their number: integers,
            their scales, low-rank branches, and 16 for what is not quantized.  Transforms and
            static activation scales are not weights; ``checkpoint_bytes`` counts them.
        weights_16bit: how many of those weights stay in 16 bits.
    """

    bits_per_weight: float
    weights_16bit: int


def weight_storage(policy: Policy, recipe: Recipe) -> WeightStorage:
    """What a recipe stores per weight of this policy, simulations as if they could be stored."""
    total, kept, bits = 0, 0, 0
    for site in sites_of(policy):
        linears = linears_of(policy.module, site)
        inputs, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
        total += inputs * outputs
        scheme = recipe.scheme_of(site)
        if scheme is None:
            kept += inputs * outputs
            bits += 8 * _REFERENCE_BYTES * inputs * outputs
        else:
            bits += 8 * sum(_nbytes(*t) for t in _weight_layout(scheme, inputs, outputs).values())
    return WeightStorage(bits / total, kept)


def memory_report(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    component_of: Callable[[str], str],
    *,
    directory_bytes: int | None = None,
) -> MemorySummary:
    """The memory table.

    Args:
        config: an artifact's configuration.
        tensors: its tensors by name.
        component_of: the part of the policy a tensor belongs to.
        directory_bytes: size of the directory; adds a row for what is not tensors.

    Returns:
        ``components`` (name, params, bits, bytes, reference_bytes), ``total_bytes``,
        ``reference_bytes``, ``reduction`` and ``paper_scope_reduction`` (fractions saved).
    """
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    sites = {site["name"]: site["component"] for site in config["sites"]}
    used = _usage(sizes, sites, set(config.get("kept", ())), component_of)
    if directory_bytes is not None:
        used.add(OVERHEAD, directory_bytes - used.total(), linear=False)
    return _summary(config["reference_parameters"], used)


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors by name or kind: dtype and shape."""


def predict(policy: Policy, recipe: Recipe) -> MemorySummary:
    """The memory table a quantization will have (tensors only).

    Nothing is computed.  Of tensors that stay as they are, those whose checkpoint has them in 32
    bits are read, since only their values tell whether 16 bits hold them.
    """
    return summary_of(policy, recipe, predicted_layout(policy, recipe))


def summary_of(
    policy: Policy, recipe: Recipe, layout: Layout, *, directory_bytes: int | None = None
) -> MemorySummary:
    """The memory table of an artifact that will have these tensors.

    Args:
        directory_bytes: size of the directory; adds a row for what is not tensors.
    """
    sizes = {name: _nbytes(*tensor) for name, tensor in layout.items()}
    sites = {site.name: site.component for site in sites_of(policy) if recipe.scheme_of(site)}
    used = _usage(sizes, sites, set(kept_linears(policy, recipe)), policy.component_of)
    if directory_bytes is not None:
        used.add(OVERHEAD, directory_bytes - used.total(), linear=False)
    return _summary(reference_parameters(policy), used)


def predicted_layout(policy: Policy, recipe: Recipe) -> Layout:
    """Every tensor an artifact will have, by name."""
    layout: Layout = {}
    quantized: set[str] = set()
    for site, kinds in _site_layouts(policy, recipe, None):
        layout |= {f"{site.name}.{kind}": tensor for kind, tensor in kinds.items()}
        quantized.update(site.linears)
    table, embedding = predicted_table(policy, recipe), predicted_embedding(policy, recipe)
    for name, parameter in policy.module.named_parameters():
        component, path = policy.component_of(name), name.rpartition(".")[0]
        if path in quantized or (table is not None and component == _STEP_TABLE_COMPONENT):
            continue
        if path == embedding:
            rows = embedding_layout(recipe.embedding_bits, *parameter.shape)
            layout |= {f"{path}.{kind}": tensor for kind, tensor in rows.items()}
        else:
            layout[name] = (_stored_dtype(policy, name, parameter), tuple(parameter.shape))
    if table is not None:
        layout[f"{_TABLE}.times"] = (table.times.dtype, tuple(table.times.shape))
        layout[f"{_TABLE}.values"] = (table.values.dtype, tuple(table.values.shape))
    return layout


def _stored_dtype(policy: Policy, name: str, parameter: Tensor) -> torch.dtype:
    """The type that ``narrowed`` will give a parameter; values are read where they decide it."""
    if not parameter.is_meta:
        return narrowed(parameter).dtype
    if policy.store is None:
        return torch.bfloat16  # only a random policy's structure is: its weights will be rounded
    known = policy.store.dtype(name)
    return known if known != torch.float32 else narrowed(policy.store.read(name)).dtype


def site_bytes(policy: Policy, recipe: Recipe, *, steps: int | None = None) -> dict[str, int]:
    """Bytes that the tensors of each site a recipe quantizes will take, by site name.

    Args:
        steps: denoising steps that scales and offsets are for; the policy's own by default.
    """
    return {
        site.name: sum(_nbytes(*tensor) for tensor in kinds.values())
        for site, kinds in _site_layouts(policy, recipe, steps)
    }


def _site_layouts(
    policy: Policy, recipe: Recipe, steps: int | None
) -> Iterator[tuple[QuantizationSite, Layout]]:
    """The tensors of every site a recipe quantizes, by kind."""
    own = getattr(policy, "steps", 1) if steps is None else steps
    for site in sites_of(policy):
        scheme = recipe.scheme_of(site)
        if scheme is None:
            continue
        linears = linears_of(policy.module, site)
        yield (
            site,
            _site_layout(
                scheme,
                linears[0].in_features,
                sum(linear.out_features for linear in linears),
                biased=any(linear.bias is not None for linear in linears),
                steps=own if site.per_step else 1,
            ),
        )


def predicted_table(policy: Policy, recipe: Recipe) -> StepTable | None:
    """What will stand for the adaptive norms, if anything."""
    if recipe.adaptive_norm != "table" or not isinstance(policy, HasStepTable):
        return None
    return policy.tabulate_modulation(recipe.table_step_counts)


def predicted_embedding(policy: Policy, recipe: Recipe) -> str | None:
    """The token embedding that will be integers, if any."""
    if recipe.embedding_bits == 16 or not isinstance(policy, HasEmbedding):
        return None
    return policy.embedding_path


class _Usage:
    """Bytes by component, quantized linears apart from the rest."""

    def __init__(self) -> None:
        self.linears: dict[str, int] = {}
        self.rest: dict[str, int] = {}

    def add(self, component: str, size: int, *, linear: bool) -> None:
        bucket = self.linears if linear else self.rest
        bucket[component] = bucket.get(component, 0) + size

    def total(self) -> int:
        return sum(self.linears.values()) + sum(self.rest.values())


def _site_layout(
    scheme: Scheme, in_features: int, outputs: int, *, biased: bool, steps: int
) -> Layout:
    """The tensors of a site (docs/artifact.md)."""
    block = scheme.transform.block
    transformed = not scheme.transform.identity
    width = padded_width(in_features, block) if transformed else in_features
    layout = _weight_layout(scheme, in_features, outputs)
    layout["weight_shape"] = (torch.int64, (2,))
    if transformed:
        layout["transform"] = (torch.bfloat16, (width // block, block, block))
    if scheme.transform.permutation != "none":
        layout["permutation"] = (torch.int32, (width,))
    # Where calibration chooses, a static scale is assumed: a few bytes too many at most.
    static = scheme.activations.scale in ("per_step", "per_step_or_token")
    centred = scheme.activations.centred
    if static:
        layout["activation_scale"] = (torch.float32, (steps,))
    if static or centred:
        layout["activation_step_times"] = (torch.float32, (steps,))
    if centred:
        layout["activation_offset"] = (torch.bfloat16, (steps, width))
        layout["bias"] = (torch.float32, (steps, outputs))
    elif biased:
        layout["bias"] = (torch.float32, (outputs,))
    return layout


def _weight_layout(scheme: Scheme, in_features: int, outputs: int) -> Layout:
    """Integers and scales of a weight [N, K], and its low-rank branch."""
    width, weights = in_features, scheme.weights
    if not scheme.transform.identity:
        width = padded_width(in_features, scheme.transform.block)
    packed = (torch.int32, packed_width(width)) if weights.bits == 4 else (torch.int8, width)
    scales = (outputs,) if weights.group is None else (outputs, -(-width // weights.group))
    layout: Layout = {
        "weight_packed": (packed[0], (outputs, packed[1])),
        "weight_scale": (torch.float32, scales),
    }
    if weights.low_rank is not None:
        rank = branch_rank(weights.low_rank, outputs, in_features)
        layout["low_rank_down"] = (torch.bfloat16, (rank, in_features))
        layout["low_rank_up"] = (torch.bfloat16, (outputs, rank))
    return layout


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def narrowed(tensor: Tensor) -> Tensor:
    """bfloat16 if that loses nothing, else float16 if that does not, else the tensor itself."""
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in (torch.bfloat16, torch.float16):
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(torch.float32), tensor):
            return narrow
    return tensor


def _usage(
    sizes: Mapping[str, int],
    sites: Mapping[str, str],
    kept: set[str],
    component_of: Callable[[str], str],
) -> _Usage:
    """What tensors take, by component; ``sites`` gives the component of each by its name."""
    used = _Usage()
    for name, size in sizes.items():
        path = name.rpartition(".")[0]
        component = sites.get(path) or _component(name, component_of)
        used.add(component, size, linear=path in sites or path in kept)
    return used


def _component(name: str, component_of: Callable[[str], str]) -> str:
    return _STEP_TABLE_COMPONENT if name.startswith(f"{_TABLE}.") else component_of(name)


def _summary(reference: Mapping[str, Mapping[str, int]], used: _Usage) -> MemorySummary:
    """Rows of all components; within the paper's scope the linears count apart from the rest."""
    everything, narrow = reference["all"], reference["paper_scope"]
    entries: list[ComponentMemory] = []
    for name in _ordered({*everything, *used.linears, *used.rest}):
        params, linear_params = everything.get(name, 0), narrow.get(name, 0)
        linears, rest = used.linears.get(name, 0), used.rest.get(name, 0)
        if linears and linear_params:
            entries.append(_entry(name, linear_params, linears, paper_scope=True))
            params, linears = params - linear_params, 0
        entries.append(_entry(name, params, linears + rest, paper_scope=False))
    return summarise(entries)


def _ordered(names: set[str]) -> list[str]:
    """The order of the data flow; it must not depend on how a configuration was stored."""
    known = {name: i for i, name in enumerate(_ORDER)}
    last = {DEAD: len(_ORDER) + 1, OVERHEAD: len(_ORDER) + 2}
    return sorted(names, key=lambda name: ((known | last).get(name, len(_ORDER)), name))


def _entry(name: str, params: int, size: int, *, paper_scope: bool) -> ComponentMemory:
    return ComponentMemory(name, params, size, _REFERENCE_BYTES * params, paper_scope)
