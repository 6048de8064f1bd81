"""What starts the GPU programs of ``triton_elementwise_device.py``."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from omega_qvla.errors import ObservationError
from omega_qvla.policies.elementwise import Gate
from omega_qvla.runtime.kernels.triton_gpu import programs

_PIECE = 1024
"""Columns per program of a gated product."""
_MOST_ELEMENTS = 2**31
"""Programs count in int32."""


def normalize(
    x: Tensor, scale: Tensor, shift: Tensor | None, *, eps: float, centred: bool
) -> Tensor:
    """A norm over the last dimension with its modulation, in one launch.

    Args:
        x: [..., T, D], floating point.
        scale: [D], or [..., 1, D]: y = norm(x) · (1 + scale) + shift.
        shift: as ``scale``, in the same layout; None for none.
        eps: added to the mean of squares.
        centred: take the mean away first (a layer norm).

    Returns:
        [..., T, D], contiguous, of the dtype of x.

    Raises:
        ObservationError: 2³¹ numbers or more, or a modulation that does not fit.
    """
    width = x.shape[-1]
    rows, scales = _rows(x), _rows(scale)
    shifts = None if shift is None else _rows(shift)
    count = rows.shape[0]
    fits = scales.shape[1] == width and len(scales) > 0 and count % len(scales) == 0
    alike = shifts is None or (shifts.shape, shifts.stride()) == (scales.shape, scales.stride())
    if not fits or not alike:
        raise ObservationError(
            f"a norm of {list(x.shape)} cannot be modulated by a scale of {list(scale.shape)} and "
            f"a shift of {None if shift is None else list(shift.shape)}"
        )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(x):
            _programs().normalize[(count,)](
                rows, scales, shifts, out, width, rows.stride(0), count // len(scales),
                scales.stride(0), EPS=eps, CENTRED=centred, WIDTH=_power_of_two(width),
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


def gated_product(kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) · up, both [..., N] of one shape and dtype, in one launch.

    Raises:
        ObservationError: two shapes, or 2³¹ numbers or more.
    """
    if gate.shape != up.shape:
        raise ObservationError(f"a gate of {list(gate.shape)} for {list(up.shape)}")
    left, right = _rows(gate), _rows(up)
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


def _rows(x: Tensor) -> Tensor:
    """[..., D] → [rows, D], a view where there can be one; neighbours are next to each other."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    if rows.shape[0] * max(rows.shape[1], abs(rows.stride(0))) >= _MOST_ELEMENTS:
        raise ObservationError(f"{list(x.shape)} are more numbers than a GPU program counts, 2³¹")
    return rows


def _power_of_two(width: int) -> int:
    return 1 << max(0, width - 1).bit_length()


def _programs():
    programs()  # says what is missing
    return importlib.import_module("omega_qvla.runtime.kernels.triton_elementwise_device")
