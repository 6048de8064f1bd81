"""Memory of the whole checkpoint, component by component, and the paper's narrower count.

The reference is the checkpoint the policy came from, every parameter of it, dead ones included, in
16 bits.  The paper's own figure (71.3 %) counts only the linears it quantizes; that number is
reported beside ours and labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from omega_qvla.policies.base import PAPER_SCOPE, HasEmbedding, Policy, linears_of, sites_of
from omega_qvla.policies.step_table import HasStepTable
from omega_qvla.recipe import Recipe, Scheme

DEAD = "never read at inference"
OVERHEAD = "file headers, manifest, processor"
_REFERENCE_BYTES = 2
_STEP_TABLE_COMPONENT = "adaptive norms"


def reference_parameters(policy: Policy) -> dict[str, Any]:
    """Parameters of the checkpoint: per component, and within the paper's scope."""
    counts: dict[str, int] = {}
    for name, parameter in policy.module.named_parameters():
        component = policy.component_of(name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    if policy.dropped_parameters:
        counts[DEAD] = policy.dropped_parameters
    scope = 0
    for site in sites_of(policy):
        if site.component in PAPER_SCOPE:
            scope += sum(linear.weight.numel() for linear in linears_of(policy.module, site))
    return {"components": counts, "paper_scope": scope}


def memory_report(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    component_of: Callable[[str], str],
    *,
    directory_bytes: int | None = None,
) -> dict[str, Any]:
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
    used: dict[str, int] = {}
    scope = 0
    for name, tensor in tensors.items():
        site = sites.get(name.rpartition(".")[0])
        component = site or _component(name, component_of)
        used[component] = used.get(component, 0) + tensor.nbytes
        if site in PAPER_SCOPE:
            scope += tensor.nbytes
    return _table(config, used, scope, directory_bytes)


def predict(policy: Policy, recipe: Recipe) -> dict[str, Any]:
    """The memory table a quantization will have, from shapes alone (tensors only)."""
    used: dict[str, int] = {}
    scope, quantized = 0, set[str]()
    for site in sites_of(policy):
        scheme = recipe.scheme(site.component)
        if scheme is None:
            continue
        linears = linears_of(policy.module, site)
        outputs = sum(linear.out_features for linear in linears)
        biased = any(linear.bias is not None for linear in linears)
        steps = getattr(policy, "steps", 1) if site.per_step else 1
        size = _site_bytes(scheme, linears[0].in_features, outputs, biased=biased, steps=steps)
        used[site.component] = used.get(site.component, 0) + size
        quantized.update(f"{name}." for name in site.linears)
        scope += size if site.component in PAPER_SCOPE else 0
    table = None
    if recipe.adaptive_norm == "table" and isinstance(policy, HasStepTable):
        table = policy.tabulate_modulation(recipe.table_step_counts)
    embedding = None
    if recipe.embedding_bits == 8 and isinstance(policy, HasEmbedding):
        embedding = policy.embedding_path
    for name, parameter in policy.module.named_parameters():
        component = policy.component_of(name)
        if any(name.startswith(prefix) for prefix in quantized):
            continue
        if table is not None and component == _STEP_TABLE_COMPONENT:
            continue
        size = parameter.nbytes
        if embedding is not None and name.startswith(f"{embedding}."):
            size = parameter.numel() + 4 * parameter.shape[0]
        used[component] = used.get(component, 0) + size
    if table is not None:
        used[_STEP_TABLE_COMPONENT] = table.times.nbytes + table.values.nbytes
    config = {"reference_parameters": reference_parameters(policy)}
    return _table(config, used, scope, None)


def _site_bytes(scheme: Scheme, in_features: int, outputs: int, *, biased: bool, steps: int) -> int:
    block = scheme.transform.block
    transformed = not scheme.transform.identity
    width = -(-in_features // block) * block if transformed else -(-in_features // 8) * 8
    groups = 1 if scheme.weights.group is None else width // scheme.weights.group
    size = outputs * width * scheme.weights.bits // 8 + 4 * outputs * groups + 16
    size += 2 * width * block if transformed else 0
    size += 8 * steps if scheme.activations.scale == "per_step" else 0
    return size + (4 * outputs if biased else 0)


def _component(name: str, component_of: Callable[[str], str]) -> str:
    return _STEP_TABLE_COMPONENT if name.startswith("step_table.") else component_of(name)


def _table(
    config: Mapping[str, Any], used: dict[str, int], scope: int, directory_bytes: int | None
) -> dict[str, Any]:
    reference = config["reference_parameters"]
    counts: dict[str, int] = reference["components"]
    if directory_bytes is not None:
        used = {**used, OVERHEAD: directory_bytes - sum(used.values())}
    rows = []
    for name in dict.fromkeys((*counts, *used)):
        params, size = counts.get(name, 0), used.get(name, 0)
        rows.append(
            {
                "name": name,
                "params": params,
                "bits": round(8 * size / params, 2) if params else None,
                "bytes": size,
                "reference_bytes": _REFERENCE_BYTES * params,
            }
        )
    total = sum(row["bytes"] for row in rows)
    whole = sum(row["reference_bytes"] for row in rows)
    narrow = _REFERENCE_BYTES * reference["paper_scope"]
    return {
        "components": rows,
        "total_bytes": total,
        "reference_bytes": whole,
        "reduction": 1.0 - total / whole,
        "paper_scope_reduction": 1.0 - scope / narrow if narrow else None,
    }
