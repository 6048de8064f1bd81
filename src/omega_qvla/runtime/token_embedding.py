"""``QuantizedEmbedding``: a token table of integers, of which only looked-up rows are expanded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.quantization.embedding import QuantizedRows, scale_rows
from omega_qvla.runtime.kernels import reference


class QuantizedEmbedding(nn.Module):
    """Token embedding stored as 8-bit or packed 4-bit rows.

    Args:
        weight: int8 [V, D], or int32 [V, ceil(D/8)] packed like weights.
        weight_scale: float32 [V], or bfloat16 [V, ceil(D/64)] for packed rows.
        width: D.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    def from_rows(cls, rows: QuantizedRows) -> QuantizedEmbedding:
        """Pack freshly quantized rows."""
        width = rows.integers.shape[1]
        if rows.bits == 8:
            return cls(rows.integers, rows.scale.squeeze(-1), width)
        return cls(pack_int4(rows.integers), rows.scale, width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] → float32 [..., D]."""
        rows, scale = self.weight[token_ids], self.weight_scale[token_ids]
        if rows.dtype == torch.int8:
            return scale_rows(rows, scale.unsqueeze(-1))
        flat = reference.unpack_words(rows.reshape(-1, rows.shape[-1]))[:, : self.width]
        return scale_rows(flat.reshape(*token_ids.shape, self.width), scale)
