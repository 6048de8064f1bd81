"""Operands of what lies between linears as rows, for the C++ and the GPU programs alike."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from omega_qvla.errors import ObservationError


def as_rows(x: Tensor) -> Tensor:
    """[..., D] → [rows, D], a view where there can be one; neighbours are next to each other."""
    rows = x.unsqueeze(0) if x.ndim == 1 else x if x.ndim == 2 else x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class Modulation(NamedTuple):
    """Scale and shift of a norm, as rows.

    Attributes:
        scale, shift: [rows, D] each, in the same layout; None for none.
        stride: from one row to the next.
        share: rows of x that share a row of these.
    """

    scale: Tensor | None
    shift: Tensor | None
    stride: int
    share: int


def modulation(x: Tensor, count: int, scale: Tensor | None, shift: Tensor | None) -> Modulation:
    """What modulates the ``count`` rows of x [..., T, D].

    Args:
        x: what is normalized.
        count: its rows.
        scale, shift: [D], or [..., 1, D], in the same layout; None for none.

    Raises:
        ObservationError: rows of another width or layout, or a number that does not divide x's.
    """
    scales = None if scale is None else as_rows(scale)
    shifts = None if shift is None else as_rows(shift)
    first = shifts if scales is None else scales
    if first is None:
        return Modulation(None, None, 0, 1)
    several, stride, width = first.shape[0], first.stride(0), x.shape[-1]
    alike = shifts is None or (shifts.shape == first.shape and shifts.stride(0) == stride)
    if not alike or first.shape[1] != width or several == 0 or count % several:
        raise ObservationError(
            f"a norm of {list(x.shape)} cannot be modulated by a scale of "
            f"{None if scale is None else list(scale.shape)} and a shift of "
            f"{None if shift is None else list(shift.shape)}"
        )
    return Modulation(scales, shifts, stride, max(1, count // several))


def check_same_shape(gate: Tensor, up: Tensor) -> None:
    """Of a gated product.

    Raises:
        ObservationError: two shapes.
    """
    if gate.shape != up.shape:
        raise ObservationError(f"a gate of {list(gate.shape)} for {list(up.shape)}")


def rotary_stride(x: Tensor, cosine: Tensor, sine: Tensor) -> int:
    """Distance of two chunks in contiguous rotary tables; 0 where all chunks share one.

    Args:
        x: [B, h, T, d].
        cosine, sine: [B or 1, 1, T, d/2].

    Raises:
        ObservationError: tables that do not fit.
    """
    batch, _, tokens, width = x.shape
    chunks = cosine.shape[0]
    wanted = (chunks, 1, tokens, width // 2)
    if cosine.shape != wanted or sine.shape != wanted or chunks not in (1, batch) or width % 2:
        raise ObservationError(
            f"heads of {list(x.shape)} cannot be rotated by tables of {list(cosine.shape)} and "
            f"{list(sine.shape)}"
        )
    return 0 if chunks == 1 else tokens * (width // 2)
