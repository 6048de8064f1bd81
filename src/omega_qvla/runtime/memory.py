"""What a policy costs in bytes, component by component: the table ``inspect`` prints.

Arithmetic over the description of an artifact; no tensor and no policy is needed.  The reference is
the checkpoint the policy came from, every parameter of it, dead ones included, in 16 bits.  Two
reductions are reported, because they are often confused: ``reduction`` counts everything in the
checkpoint, and ``paper_scope_reduction`` only the linears the paper quantizes (arXiv 2605.28803,
section 4, which has 71.3 %).  Linears that a recipe leaves in 16 bits inside a component it
quantizes count there as what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from omega_qvla.artifact.layout import Layout

DEAD = "never read at inference"
OVERHEAD = "file headers, manifest, processor"
REFERENCE_BYTES = 2
"""Per parameter of the checkpoint."""
TABULATED, STEP_TABLE = "adaptive norms", "step_table"
"""The component that a table over flow time stands for, and what its tensors' names begin with."""
_ORDER = ("vision", "projector", "token embedding", "backbone", TABULATED, "action_head")


@dataclass(frozen=True)
class ComponentMemory:
    """The memory of one component, or of one part of it.

    Attributes:
        name: component as shown in the table; entries with the same name share one row.
        params: number of parameters of the full-precision policy that this stands for.
        bytes: what storing it takes now, scales and transforms included.
        reference_bytes: what it takes in the full-precision checkpoint.
        paper_scope: whether it is one of the linears that the paper counts.
    """

    name: str
    params: int
    bytes: int
    reference_bytes: int
    paper_scope: bool = False


class ComponentRow(TypedDict):
    """One row of the table; ``bits`` is stored bits per parameter."""

    name: str
    params: int
    bits: float
    bytes: int
    reference_bytes: int


class MemorySummary(TypedDict):
    """The memory part of ``inspect``'s JSON; a reduction is None where nothing is counted."""

    components: list[ComponentRow]
    total_bytes: int
    reference_bytes: int
    reduction: float | None
    paper_scope_reduction: float | None


def memory_report(
    config: Mapping[str, Any], layout: Layout, *, directory_bytes: int | None = None
) -> MemorySummary:
    """The memory table.

    Args:
        config: the content of ``omega_config.json``.
        layout: the artifact's tensors by name.
        directory_bytes: size of the directory; adds a row for what is not tensors.

    Returns:
        ``components`` (name, params, bits, bytes, reference_bytes), ``total_bytes``,
        ``reference_bytes``, ``reduction`` and ``paper_scope_reduction`` (fractions saved).
    """
    sites = {site["name"]: site["component"] for site in config["sites"]}
    others = {name: part for part, names in config["components"].items() for name in names}
    kept = set(config["kept"])
    linears: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for name, spec in layout.items():
        path = name.rpartition(".")[0]
        if path == STEP_TABLE:
            component = TABULATED
        else:
            # Beside the weight of an embedding are its scales.
            component = sites.get(path) or others.get(name) or others[f"{path}.weight"]
        (linears if path in sites or path in kept else rest)[component] += spec.nbytes
    if directory_bytes is not None:
        rest[OVERHEAD] = directory_bytes - linears.total() - rest.total()
    return summarise(_entries(config["reference_parameters"], linears, rest))


def _entries(
    reference: Mapping[str, Mapping[str, int]], linears: Mapping[str, int], rest: Mapping[str, int]
) -> Iterable[ComponentMemory]:
    """Parts of all components; within the paper's scope the linears count apart from the rest."""
    everything, narrow = reference["all"], reference["paper_scope"]
    for name in _ordered({*everything, *linears, *rest}):
        params, linear_params = everything.get(name, 0), narrow.get(name, 0)
        held, other = linears.get(name, 0), rest.get(name, 0)
        if held and linear_params:
            yield _entry(name, linear_params, held, paper_scope=True)
            params, held = params - linear_params, 0
        yield _entry(name, params, held + other, paper_scope=False)


def summarise(entries: Iterable[ComponentMemory]) -> MemorySummary:
    """Rows in order of first appearance, totals, and both reductions (1 - bytes / reference)."""
    parts = list(entries)
    names = list(dict.fromkeys(part.name for part in parts))
    rows = [_row(name, [part for part in parts if part.name == name]) for name in names]
    return MemorySummary(
        components=rows,
        total_bytes=sum(part.bytes for part in parts),
        reference_bytes=sum(part.reference_bytes for part in parts),
        reduction=_reduction(parts),
        paper_scope_reduction=_reduction([part for part in parts if part.paper_scope]),
    )


def _row(name: str, parts: Sequence[ComponentMemory]) -> ComponentRow:
    params = sum(part.params for part in parts)
    stored = sum(part.bytes for part in parts)
    return ComponentRow(
        name=name,
        params=params,
        bits=round(8.0 * stored / params, 4) if params else 0.0,
        bytes=stored,
        reference_bytes=sum(part.reference_bytes for part in parts),
    )


def _reduction(parts: Sequence[ComponentMemory]) -> float | None:
    reference = sum(part.reference_bytes for part in parts)
    return round(1.0 - sum(part.bytes for part in parts) / reference, 6) if reference else None


def _ordered(names: set[str]) -> list[str]:
    """The order of the data flow; it must not depend on how a configuration was stored."""
    known = {name: i for i, name in enumerate(_ORDER)}
    last = {DEAD: len(_ORDER) + 1, OVERHEAD: len(_ORDER) + 2}
    return sorted(names, key=lambda name: ((known | last).get(name, len(_ORDER)), name))


def _entry(name: str, params: int, size: int, *, paper_scope: bool) -> ComponentMemory:
    return ComponentMemory(name, params, size, REFERENCE_BYTES * params, paper_scope)
