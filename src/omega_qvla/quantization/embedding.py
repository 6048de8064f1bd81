"""Token embeddings as integer rows: a table lookup needs no rotation, only scales.

8-bit rows have one float32 scale each.  4-bit rows have one scale per group of 64 columns, chosen
by the clip search that weights use and rounded to bfloat16 *before* the integers are, so that what
is stored is exactly what was rounded with: 4.25 bits a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omega_qvla.artifact.layout import EMBEDDING_GROUP
from omega_qvla.errors import NonFiniteError
from omega_qvla.quantization.weights import symmetric_scale

_CHUNK = 1 << 14
"""Rows at a time: the full-size table has 257 152 of 2048."""


@dataclass(frozen=True)
class QuantizedRows:
    """Integer rows and their scales.

    Attributes:
        path: dotted path of the embedding module.
        integers: [V, D] int8, in [-127, 127] or [-8, 7].
        scale: [V, 1] float32 for 8 bits, [V, ceil(D/64)] bfloat16 for 4.
        bits: width of the integers.
    """

    path: str
    integers: Tensor
    scale: Tensor
    bits: Literal[4, 8]


def scale_rows(integers: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., D] times scales [..., G] of D/G columns each (the last may be shorter)."""
    width = integers.shape[-1]
    spread = scale.to(torch.float32)
    if scale.shape[-1] > 1:
        spread = spread.repeat_interleave(EMBEDDING_GROUP, dim=-1)[..., :width]
    return integers.to(torch.float32) * spread


def quantize_rows(path: str, table: Tensor, bits: Literal[4, 8]) -> QuantizedRows:
    """Round an embedding table [V, D] to symmetric integers.

    Raises:
        NonFiniteError: the table has NaN or Inf.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for part in table.split(_CHUNK):
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(f"weight of {path!r} has NaN or Inf; the checkpoint is damaged")
        values = part.to(torch.float32)
        parts.append(_four_bits(values) if bits == 4 else _eight_bits(values))
    integers, scales = zip(*parts, strict=True)
    return QuantizedRows(path, torch.cat(integers), torch.cat(scales), bits)


def _eight_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    largest = rows.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale


def _four_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = symmetric_scale(rows, 4, "mse", EMBEDDING_GROUP).to(torch.bfloat16)
    spread = scale.to(torch.float32).repeat_interleave(EMBEDDING_GROUP, dim=1)
    integers = (rows / spread[:, : rows.shape[1]]).round().clamp(-8, 7)
    return integers.to(torch.int8), scale
