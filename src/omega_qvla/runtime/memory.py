"""Memory of the whole checkpoint, component by component, and the paper's narrower count.

The reference is the checkpoint the policy came from, every parameter of it, dead ones included, in
16 bits.  The paper's own figure (71.3 %) counts only the linears it quantizes; that number is
reported beside ours and labelled.  Linears that a recipe leaves in 16 bits inside a component it
quantizes count there as what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla.artifact.memory import ComponentMemory, MemorySummary, summarise
from omega_qvla.artifact.packing import packed_width
from omega_qvla.policies.base import PAPER_SCOPE, HasEmbedding, Policy, linears_of, sites_of
from omega_qvla.policies.step_table import HasStepTable, StepTable
from omega_qvla.quantization.low_rank import branch_rank
from omega_qvla.quantization.transforms import padded_width
from omega_qvla.recipe import Recipe, Scheme
from omega_qvla.runtime.embedding import embedding_layout

DEAD = "never read at inference"
OVERHEAD = "file headers, manifest, processor"
_REFERENCE_BYTES = 2
_STEP_TABLE_COMPONENT = "adaptive norms"
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
            bits += 8 * _weight_bytes(scheme, inputs, outputs)
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
    sites = {site["name"]: site["component"] for site in config["sites"]}
    kept = set(config.get("kept", ()))
    used = _Usage()
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        component = sites.get(path) or _component(name, component_of)
        used.add(component, tensor.nbytes, linear=path in sites or path in kept)
    if directory_bytes is not None:
        used.add(OVERHEAD, directory_bytes - used.total(), linear=False)
    return _summary(config["reference_parameters"], used)


def predict(policy: Policy, recipe: Recipe) -> MemorySummary:
    """The memory table a quantization will have, from shapes alone (tensors only)."""
    used = _Usage()
    quantized: set[str] = set()
    kept = set(kept_linears(policy, recipe))
    sizes = site_bytes(policy, recipe)
    for site in sites_of(policy):
        if site.name in sizes:
            used.add(site.component, sizes[site.name], linear=True)
            quantized.update(site.linears)
    table, embedding = _step_table(policy, recipe), _embedding(policy, recipe)
    for name, parameter in policy.module.named_parameters():
        component, path = policy.component_of(name), name.rpartition(".")[0]
        if path in quantized or (table is not None and component == _STEP_TABLE_COMPONENT):
            continue
        size = narrowed(parameter).nbytes
        if path == embedding:
            size = _embedding_bytes(recipe.embedding_bits, *parameter.shape)
        used.add(component, size, linear=path in kept)
    if table is not None:
        used.add(_STEP_TABLE_COMPONENT, table.times.nbytes + table.values.nbytes, linear=False)
    return _summary(reference_parameters(policy), used)


def site_bytes(policy: Policy, recipe: Recipe, *, steps: int | None = None) -> dict[str, int]:
    """Bytes that the tensors of each site a recipe quantizes will take, by site name.

    Args:
        steps: denoising steps that scales and offsets are for; the policy's own by default.
    """
    own = getattr(policy, "steps", 1) if steps is None else steps
    sizes: dict[str, int] = {}
    for site in sites_of(policy):
        scheme = recipe.scheme_of(site)
        if scheme is None:
            continue
        linears = linears_of(policy.module, site)
        sizes[site.name] = _site_bytes(
            scheme,
            linears[0].in_features,
            sum(linear.out_features for linear in linears),
            biased=any(linear.bias is not None for linear in linears),
            steps=own if site.per_step else 1,
        )
    return sizes


def _step_table(policy: Policy, recipe: Recipe) -> StepTable | None:
    if recipe.adaptive_norm != "table" or not isinstance(policy, HasStepTable):
        return None
    return policy.tabulate_modulation(recipe.table_step_counts)


def _embedding_bytes(bits: int, rows: int, width: int) -> int:
    layout = embedding_layout(bits, rows, width)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def _embedding(policy: Policy, recipe: Recipe) -> str | None:
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


def _site_bytes(scheme: Scheme, in_features: int, outputs: int, *, biased: bool, steps: int) -> int:
    block = scheme.transform.block
    transformed = not scheme.transform.identity
    width = padded_width(in_features, block) if transformed else in_features
    size = _weight_bytes(scheme, in_features, outputs) + 16
    size += 2 * width * block if transformed else 0
    size += 4 * width if scheme.transform.permutation != "none" else 0
    # Where calibration chooses, a static scale is assumed: a few bytes too many at most.
    static = scheme.activations.scale in ("per_step", "per_step_or_token")
    centred = scheme.activations.centred
    size += 4 * steps * (static + (static or centred))  # scales, and the times of what there is
    if centred:
        return size + steps * (2 * width + 4 * outputs)
    return size + (4 * outputs if biased else 0)


def _weight_bytes(scheme: Scheme, in_features: int, outputs: int) -> int:
    """Integers and scales of a weight [N, K], and its low-rank branch."""
    width, weights = in_features, scheme.weights
    if not scheme.transform.identity:
        width = padded_width(in_features, scheme.transform.block)
    groups = 1 if weights.group is None else -(-width // weights.group)
    row = 4 * packed_width(width) if weights.bits == 4 else width
    size = outputs * row + 4 * outputs * groups
    if weights.low_rank is not None:
        rank = branch_rank(weights.low_rank, outputs, in_features)
        size += 2 * rank * (outputs + in_features)
    return size


def narrowed(tensor: Tensor) -> Tensor:
    """bfloat16 if that loses nothing, else the tensor itself."""
    if tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(torch.bfloat16)
    if tensor.is_meta:
        return narrow  # only a random policy's structure is: its weights will be rounded
    return narrow if torch.equal(narrow.to(torch.float32), tensor) else tensor


def _component(name: str, component_of: Callable[[str], str]) -> str:
    return _STEP_TABLE_COMPONENT if name.startswith("step_table.") else component_of(name)


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
