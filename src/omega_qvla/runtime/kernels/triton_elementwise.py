"""What starts the GPU programs of ``triton_elementwise_device.py``."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from omega_qvla.errors import ObservationError
from omega_qvla.policies.layers.elementwise import Gate
from omega_qvla.runtime.kernels.operand_rows import (
    as_rows,
    check_same_shape,
    modulation,
    rotary_stride,
)
from omega_qvla.runtime.kernels.triton_gpu import programs

_PIECE = 1024
"""Columns per program of a gated product."""
_MOST_ELEMENTS = 2**31
"""Programs count in int32."""


def normalize(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    *,
    base: float = 1.0,
    eps: float,
    centred: bool,
) -> Tensor:
    """A norm over the last dimension with its modulation, in one launch.

    Args:
        x: [..., T, D], floating point.
        scale: [D], or [..., 1, D]: y = norm(x) · (base + scale) + shift.
        shift: as ``scale``, in the same layout; None for none.
        base: 1 where scales are offsets from one, 0 where they are the factors.
        eps: added to the mean of squares.
        centred: take the mean away first (a layer norm).

    Returns:
        [..., T, D], contiguous, of the dtype of x.

    Raises:
        ObservationError: 2³¹ numbers or more, or a modulation that does not fit.
    """
    width, rows = x.shape[-1], _counted(x)
    given = modulation(x, rows.shape[0], scale, shift)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _programs().normalize[(rows.shape[0],)](
                rows, given.scale, given.shift, out, width, rows.stride(0), given.share,
                given.stride, BASE=base, EPS=eps, CENTRED=centred, WIDTH=_power_of_two(width),
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def gated_product(kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) · up, both [..., N] of one shape and dtype, in one launch.

    Raises:
        ObservationError: two shapes, or 2³¹ numbers or more.
    """
    check_same_shape(gate, up)
    left, right = _counted(gate), _counted(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        count, width = left.shape
        piece = min(_PIECE, _power_of_two(width))
        with torch.cuda.device_of(gate):
            _programs().gated_product[(count, -(-width // piece))](
                left, right, out, width, left.stride(0), right.stride(0),
                KIND=kind, WIDTH=piece, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding in one launch.

    Args:
        x: [B, h, T, d], floating point.
        cosine, sine: [B or 1, 1, T, d/2].

    Returns:
        [B, h, T, d], contiguous, of the dtype that x and the tables are promoted to.

    Raises:
        ObservationError: 2³¹ numbers or more, or tables that do not fit.
    """
    table = rotary_stride(x, cosine, sine)
    batch, heads, tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    _check_count(x, max(x.numel(), reach))
    cosine, sine = cosine.contiguous(), sine.contiguous()
    out = torch.empty(x.shape, dtype=torch.result_type(x, cosine), device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _programs().rotate[(batch * heads * tokens,)](
                x, cosine, sine, out, heads, tokens, width // 2, *x.stride()[:3], table,
                HALF=_power_of_two(width // 2), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _counted(x: Tensor) -> Tensor:
    """Rows whose numbers a GPU program can count."""
    rows = as_rows(x)
    _check_count(x, rows.shape[0] * max(rows.shape[1], abs(rows.stride(0))))
    return rows


def _check_count(x: Tensor, count: int) -> None:
    if count >= _MOST_ELEMENTS:
        raise ObservationError(f"{list(x.shape)} are more numbers than a GPU program counts, 2³¹")


def _power_of_two(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def _programs():
    programs()  # says what is missing
    return importlib.import_module("omega_qvla.runtime.kernels.triton_elementwise_device")
