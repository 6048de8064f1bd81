"""What lies between linears, in float64, and how far float32 may be from it.

Norms and gates are not the definition's bit for bit (a sum is made in another order, an
exponential is the device's own), so each is held to a few roundings of float32 of its terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDINGS = 8 * 2**-24
"""Relative error of what is computed in a few float32 operations."""

UNFIT = {
    "width": (torch.ones(7), None),
    "rows": (torch.ones((2, 1, 8)), torch.ones((1, 1, 8))),
    "tokens": (torch.ones((4, 1, 8)), None),
    "layout": (torch.ones((2, 3, 8))[:, :1], torch.ones((2, 1, 8))),
    "none": (torch.ones((0, 8)), None),
}
"""Scales and shifts that do not modulate a norm of [2, 3, 8]."""


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal float32 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_close(found: Tensor, wanted: Tensor, size: Tensor) -> None:
    """Within some roundings of the terms it was added up from."""
    assert found.shape == wanted.shape
    distance = (found.double() - wanted).abs()
    assert bool((distance <= ROUNDINGS * (size.double() + 1e-30)).all())


def exponent(kind: str, gate: Tensor) -> Tensor:
    """t of activation(gate) = gate · sigmoid(t)."""
    if kind == "silu":
        return gate
    return 2.0 * math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)


def activation(kind: str, gate: Tensor) -> Tensor:
    """By its exponential, since the 1 + tanh of gelu is 0 long before the result is."""
    return gate * exponent(kind, gate).sigmoid()


def normed(
    x: Tensor, factor: Tensor, shift: Tensor, *, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """norm(x) · factor + shift in float64, and the size of its terms."""
    values = x.double()
    values = values - values.mean(-1, keepdim=True) if centred else values
    # What is left of a row of one number, or of equal ones, is rounding: as large as the row was.
    size = x.double().abs().amax(-1, keepdim=True).expand_as(values)
    inverse = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = values * inverse
    terms = (unit.abs() + size * inverse) * factor.double().abs() + shift.double().abs()
    return unit * factor.double() + shift.double(), terms


def gated(kind: str, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """activation(gate) · up in float64, and the size of its terms.

    Far below zero what passes is e^t, which is off by t times what t is; then it is 0.
    """
    wide, other = gate.double(), up.double()
    passed = activation(kind, wide)
    size = passed.abs() * (4.0 + exponent(kind, wide).abs().clamp(max=90.0)) + 1e-29
    return passed * other, size * other.abs()
