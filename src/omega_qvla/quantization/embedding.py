"""Token embeddings as int8 rows: a table lookup needs no rotation, only one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.errors import NonFiniteError


@dataclass(frozen=True)
class QuantizedRows:
    """int8 rows with one scale each: row_v ≈ integers[v] · scale[v].

    Attributes:
        path: dotted path of the embedding module.
        integers: [V, D] int8.
        scale: [V] float32.
    """

    path: str
    integers: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """[V, D] float32."""
        return self.integers.to(torch.float32) * self.scale.unsqueeze(-1)


def quantize_rows(path: str, table: Tensor) -> QuantizedRows:
    """Round each row of an embedding table [V, D] to symmetric int8.

    Raises:
        NonFiniteError: the table has NaN or Inf.
    """
    if not bool(torch.isfinite(table).all()):
        raise NonFiniteError(f"weight of {path!r} has NaN or Inf; the checkpoint is damaged")
    largest = table.abs().amax(dim=-1).to(torch.float32)
    scale = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
    integers = (table / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
    return QuantizedRows(path, integers, scale)
