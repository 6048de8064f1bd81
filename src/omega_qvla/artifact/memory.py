"""What a policy costs in bytes, component by component: the table ``inspect`` prints.

Pure arithmetic over descriptions; it sees no policy and no tensor.  Two reductions are reported,
because they are often confused: ``reduction`` counts everything in the checkpoint, and
``paper_scope_reduction`` only the linears the paper quantizes (arXiv 2605.28803, section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict


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
        bits=8.0 * stored / params if params else 0.0,
        bytes=stored,
        reference_bytes=sum(part.reference_bytes for part in parts),
    )


def _reduction(parts: Sequence[ComponentMemory]) -> float | None:
    reference = sum(part.reference_bytes for part in parts)
    return 1.0 - sum(part.bytes for part in parts) / reference if reference else None
