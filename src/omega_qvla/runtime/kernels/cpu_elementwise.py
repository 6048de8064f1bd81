"""The C++ of what lies between linears (``csrc/elementwise.h``): a call for each, on addresses.

PyTorch takes several passes over memory for each of these, and on a processor what is between the
four-bit linears takes as long as they do.  One call makes one pass.  All instruction sets give the
same bits; PyTorch's last bits differ, since it sums in another order and has another exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import ObservationError
from omega_qvla.policies.elementwise import Gate
from omega_qvla.runtime.kernels.cpu import extension


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
    left = _rows(x)
    out = torch.empty(x.shape)
    if up is None:
        right, distance = 0, 0
    elif up.shape == x.shape:
        rows = _rows(up)
        right, distance = rows.data_ptr(), rows.stride(0)
    else:
        raise ObservationError(f"a gate of {list(x.shape)} for {list(up.shape)}")
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
    eps: float,
    centred: bool,
) -> Tensor:
    """A norm over the last dimension with its modulation, norm(x) · (1 + scale) + shift.

    Args:
        path: number of the instruction set.
        threads: the caller and up to ``threads - 1`` helpers.
        x: float32 [..., T, D], on the CPU.
        scale: float32 [D], or [..., 1, D]; None for 0.
        shift: as ``scale``, in the same layout; None for 0.
        eps: added to the mean of squares.
        centred: take the mean away first (a layer norm).

    Returns:
        float32 [..., T, D], contiguous.

    Raises:
        ObservationError: a modulation that does not fit.
    """
    rows = _rows(x)
    count, width = rows.shape
    scales = None if scale is None else _rows(scale)
    shifts = None if shift is None else _rows(shift)
    given = [one for one in (scales, shifts) if one is not None]
    several, distance = (given[0].shape[0], given[0].stride(0)) if given else (1, 0)
    alike = all((*one.shape, one.stride(0)) == (several, width, distance) for one in given)
    if not alike or several == 0 or count % several:
        raise ObservationError(
            f"a norm of {list(x.shape)} cannot be modulated by a scale of "
            f"{None if scale is None else list(scale.shape)} and a shift of "
            f"{None if shift is None else list(shift.shape)}"
        )
    out = torch.empty(x.shape)
    extension().normalize(
        path, threads, rows.data_ptr(), rows.stride(0), _address(scales), _address(shifts),
        distance, max(1, count // several), out.data_ptr(), count, width, eps, centred,
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
    batch, heads, tokens, width = x.shape
    chunks = cosine.shape[0]
    wanted = (chunks, 1, tokens, width // 2)
    if cosine.shape != wanted or sine.shape != wanted or chunks not in (1, batch) or width % 2:
        raise ObservationError(
            f"heads of {list(x.shape)} cannot be rotated by tables of {list(cosine.shape)} and "
            f"{list(sine.shape)}"
        )
    x = x if x.stride(-1) == 1 else x.contiguous()
    cosine, sine = cosine.contiguous(), sine.contiguous()
    out = torch.empty(x.shape)
    extension().rotate(
        path, threads, x.data_ptr(), x.stride(0), x.stride(2), x.stride(1),
        cosine.data_ptr(), sine.data_ptr(), 0 if chunks == 1 else tokens * (width // 2),
        out.data_ptr(), batch, tokens, heads, width // 2,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """[..., D] → [rows, D], a view where there can be one; neighbours are next to each other."""
    rows = x.unsqueeze(0) if x.ndim == 1 else x if x.ndim == 2 else x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
