"""Weights and offsets in the layout the GPU programs read, and back.

A row of weight is cut into pairs of blocks of 64 inputs.  Byte i of a pair holds input i of its
first block in the low four bits and input i of its second in the high four, so that one program
reads 64 bytes and has two whole blocks, each in the order of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Inputs per transform block, and per weight scale where there are groups."""
_PACKED = 2 * BLOCK
_ROWS_AT_ONCE = 1024
"""Rows of weight that are converted at a time: what the conversion needs beside its result."""


def pack(words: Tensor, columns: int) -> Tensor:
    """Row-major words int32 [N, ⌈K/8⌉] → the kernels' bytes, int8 [N, width/2], on one device.

    The integers exist one to a byte only for some rows at a time.
    """
    width = padded_width(columns)
    out = torch.empty((words.shape[0], width // 2), dtype=torch.int8, device=words.device)
    for part, target in zip(words.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        octets = part.contiguous().view(torch.uint8)
        nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)[:, :columns] ^ 8
        nibbles = torch.nn.functional.pad(nibbles, (0, width - columns))
        low, high = nibbles.view(len(part), -1, 2, BLOCK).unbind(2)
        target.copy_((low | (high << 4)).flatten(1).view(torch.int8))
    return out


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack``; fillers past the last word's values are zero bits again."""
    words = torch.empty(
        (packed.shape[0], -(-columns // 8)), dtype=torch.int32, device=packed.device
    )
    for part, target in zip(packed.split(_ROWS_AT_ONCE), words.split(_ROWS_AT_ONCE), strict=True):
        octets = part.view(torch.uint8).view(len(part), -1, BLOCK)
        nibbles = torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)[:, :columns] ^ 8
        nibbles = torch.nn.functional.pad(nibbles, (0, -columns % 8))
        target.copy_((nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32))
    return words


def spread_offset(offset: Tensor) -> Tensor:
    """Offsets [..., K'] as the kernels read them: filled up with zeros to whole pairs of blocks."""
    missing = padded_width(offset.shape[-1]) - offset.shape[-1]
    return torch.nn.functional.pad(offset, (0, missing)).contiguous()


def padded_width(columns: int) -> int:
    """Inputs per row of packed weight: whole pairs of blocks."""
    return -(-columns // _PACKED) * _PACKED
