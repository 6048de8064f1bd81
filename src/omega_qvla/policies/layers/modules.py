"""Small parts that layers and networks are put together from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


class Node(nn.Module):
    """A bare node of an official key tree."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def embedding(count: int, width: int) -> nn.Embedding:
    """An embedding table; on the meta device without the random start it could not have anyway.

    (Drawing it there would import PyTorch's compiler, which takes longer than loading a policy.)
    """
    table = torch.empty((count, width))
    return nn.Embedding(count, width, _weight=table if table.is_meta else table.normal_())


def shared_input(x: torch.Tensor, *linears: nn.Module | None) -> tuple[torch.Tensor, ...]:
    """Apply linears that read the same input.

    In full precision each slot holds an ``nn.Linear``.  In a quantized policy the first slot holds
    one fused module whose output concatenates all of them (``splits`` gives the widths) and the
    other slots are empty, so the input is transformed and quantized once.
    """
    first, *rest = linears
    if first is None:
        raise ValueError("the first slot of a site is empty")
    y = first(x)
    if rest and all(linear is None for linear in rest):
        return tuple(y.split(first.splits, dim=-1))
    return (y, *(linear(x) for linear in rest if linear is not None))


def time_embedding(times: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """Sines, then cosines of flow times [B] → [B, width], float64.

    The periods are spaced geometrically from ``shortest`` to ``longest``.
    """
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=times.device)
    period = shortest * (longest / shortest) ** fraction
    angle = 2.0 * math.pi / period * times.to(torch.float64).unsqueeze(-1)
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
