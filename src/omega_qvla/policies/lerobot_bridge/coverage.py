"""The coverage report: what of a policy becomes integers, and why the rest does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import nn

from omega_qvla.policies.lerobot_bridge.watching import Watched

_NAMED = 3


class CoverageRow(TypedDict):
    """One line of the report.

    ``treatment`` is ``quantized``, ``kept`` (in full precision) or ``left out`` (in no artifact);
    ``what`` says of what, and why; ``count`` modules with ``parameters`` numbers in all; ``names``
    are the linears' paths, or the types of other modules.
    """

    treatment: Literal["quantized", "kept", "left out"]
    what: str
    count: int
    parameters: int
    names: list[str]


def coverage(module: nn.Module, watched: Watched) -> list[CoverageRow]:
    """The report of a module that was watched, before anything is quantized.

    Args:
        module: with its full-precision linears; those left out may be gone from it.
        watched: what the pass has shown.
    """
    modules = dict(module.named_modules())
    rows: list[CoverageRow] = []
    counted: set[str] = set()

    def add(treatment: Any, what: str, names: Sequence[str]) -> None:
        if not names:
            return
        counted.update(names)
        held = sum(_numbers(modules[name]) for name in names)
        rows.append(
            CoverageRow(
                treatment=treatment, what=what, count=len(names), parameters=held, names=[*names]
            )
        )

    add("quantized", "linears that run once per observation (backbone)", watched.once)
    steps = f"{watched.steps} step{'s' if watched.steps != 1 else ''}"
    per_step = f"linears that run per denoising step (action head, {steps})"
    add("quantized", per_step, watched.per_step)
    for left in watched.kept:
        add("kept", f"linears: {left.reason}", left.names)
    add("left out", "linears that are never called", watched.absent)
    rows += _others(module, counted)
    return rows


def _others(module: nn.Module, counted: set[str]) -> Iterable[CoverageRow]:
    """Everything that is no linear, by the type of the module that holds it, largest first."""
    counts: dict[str, tuple[int, int]] = {}
    for name, child in module.named_modules():
        own = sum(p.numel() for p in child.parameters(recurse=False))
        if own and name not in counted:
            kind = type(child).__name__
            number, held = counts.get(kind, (0, 0))
            counts[kind] = number + 1, held + own
    ordered = sorted(counts.items(), key=lambda item: -item[1][1])
    if ordered:
        yield CoverageRow(
            treatment="kept",
            what="not linears",
            count=sum(number for number, _ in counts.values()),
            parameters=sum(held for _, held in counts.values()),
            names=[kind for kind, _ in ordered],
        )


def _numbers(module: nn.Module) -> int:
    """Weights and biases; a linear that was left out answers with their shapes."""
    tensors = (getattr(module, "weight", None), getattr(module, "bias", None))
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


def coverage_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The report as lines of text."""
    total = sum(int(row["parameters"]) for row in rows)
    lines: list[str] = []
    for row in rows:
        names = list(row["names"])
        more = f", … {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        share = int(row["parameters"]) / total if total else 0.0
        shown = "" if row["treatment"] == "quantized" else f": {', '.join(names[:_NAMED])}{more}"
        lines.append(f"{row['treatment']:9s} {share:6.1%}  {row['count']} {row['what']}{shown}")
    return lines
