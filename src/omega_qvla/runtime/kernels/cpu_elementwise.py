"""The C++ of what lies between linears (``csrc/elementwise.h``): a call for each, on addresses.

PyTorch takes several passes over memory for each of these, and in a small policy what is between
the four-bit linears takes as long as they do.  One call makes one pass.  All instruction sets give
the same bits; PyTorch's last bits differ, since it sums in another order and has another
exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.policies.layers.elementwise import Gate
from omega_qvla.runtime.kernels.cpu import address, extension
from omega_qvla.runtime.kernels.operand_rows import (
    as_rows,
    check_same_shape,
    modulation,
    rotary_stride,
)


def gate(path: int, threads: int, kind: Gate, x: Tensor, up: Tensor | None = None) -> Tensor:
    """activation(x) · up, or activation(x) alone, in one pass.

    Args:
        path: number of the instruction set (``cpu.path_number``).
        threads: the caller and up to ``threads - 1`` helpers.
        kind: the activation.
        x: float32 [..., N], on the CPU.
        up: the same shape and dtype.

    Returns:
        float32 [..., N], contiguous.

    Raises:
        ObservationError: two shapes.
    """
    left = as_rows(x)
    out = _room(x)
    right, distance = 0, 0
    if up is not None:
        check_same_shape(x, up)
        rows = as_rows(up)
        right, distance = rows.data_ptr(), rows.stride(0)
    extension().gate(
        path, threads, left.data_ptr(), left.stride(0), right, distance, out.data_ptr(),
        *left.shape, kind == "silu",
    )  # fmt: skip
    return out


def normalize(
    path: int,
    threads: int,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    base: float = 1.0,
    eps: float,
    centred: bool,
) -> Tensor:
    """A norm over the last dimension with its modulation, norm(x) · (base + scale) + shift.

    Args:
        path: number of the instruction set.
        threads: the caller and up to ``threads - 1`` helpers.
        x: float32 [..., T, D], on the CPU.
        scale: float32 [D], or [..., 1, D]; None for a factor of 1.
        shift: as ``scale``, in the same layout; None for 0.
        base: 1 where scales are offsets from one, 0 where they are the factors.
        eps: added to the mean of squares.
        centred: take the mean away first (a layer norm).

    Returns:
        float32 [..., T, D], contiguous.

    Raises:
        ObservationError: a modulation that does not fit.
    """
    rows = as_rows(x)
    given = modulation(x, rows.shape[0], scale, shift)
    out = _room(x)
    extension().normalize(
        path, threads, rows.data_ptr(), rows.stride(0), address(given.scale),
        address(given.shift), base, given.stride, given.share, out.data_ptr(), *rows.shape,
        eps, centred,
    )  # fmt: skip
    return out


def rotate(path: int, threads: int, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding.

    Args:
        path: number of the instruction set.
        threads: the caller and up to ``threads - 1`` helpers.
        x: float32 [B, h, T, d], on the CPU.
        cosine, sine: float32 [B or 1, 1, T, d/2].

    Returns:
        float32 [B, h, T, d], contiguous.

    Raises:
        ObservationError: a table that does not fit.
    """
    table = rotary_stride(x, cosine, sine)
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    out = _room(x)
    extension().rotate(
        path, threads, x.data_ptr(), x.stride(0), x.stride(2), x.stride(1),
        cosine.data_ptr(), sine.data_ptr(), table, out.data_ptr(),
        batch, tokens, heads, width // 2,
    )  # fmt: skip
    return out


def _room(x: Tensor) -> Tensor:
    """For a result of this shape, without gaps."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
