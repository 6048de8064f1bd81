"""Eight signed 4-bit integers in one 32-bit word.

Layout, the ``pack-quantized`` layout of compressed-tensors, so that its tools read our weights:
every value v in [-8, 7] is stored as the unsigned nibble v + 8, and column 8·w + j of a row lies in
bits 4j … 4j + 3 of that row's word w (lowest bits first).  A row of K values takes ⌈K/8⌉ words;
nibbles past the end of the row are 0.  They are not values (0 would read as -8), which is why the
shape [N, K] is stored beside the words, and why two packings of the same integers are the same
bytes.

Source: the published format of vllm-project/compressed-tensors (``pack_to_int32``); written anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omega_qvla.errors import ArtifactError

VALUES_PER_WORD = 8
_OFFSET = 8
_NIBBLE = 0xF


def packed_width(columns: int) -> int:
    """Words per row of ``columns`` 4-bit values."""
    return -(-columns // VALUES_PER_WORD)


def pack_int4(integers: Tensor) -> Tensor:
    """Pack int8 [N, K] with values in [-8, 7] into int32 [N, ⌈K/8⌉].

    Raises:
        ArtifactError: not a two-dimensional int8 tensor, or a value outside [-8, 7].
    """
    if integers.dtype != torch.int8 or integers.ndim != 2:
        raise ArtifactError(
            f"4-bit packing expects int8 [N, K], found {integers.dtype} {list(integers.shape)}"
        )
    if integers.numel() and (int(integers.min()) < -8 or int(integers.max()) > 7):
        raise ArtifactError(
            "4-bit packing expects integers in [-8, 7], found "
            f"[{int(integers.min())}, {int(integers.max())}]"
        )
    rows, columns = integers.shape
    words = packed_width(columns)
    nibbles = torch.zeros(
        (rows, words * VALUES_PER_WORD), dtype=torch.uint8, device=integers.device
    )
    nibbles[:, :columns] = (integers + _OFFSET).to(torch.uint8)
    low, high = nibbles[:, 0::2], nibbles[:, 1::2]
    octets = torch.empty((rows, words * 4), dtype=torch.uint8, device=integers.device)
    torch.bitwise_or(low, high << 4, out=octets)  # byte b of a word: its nibbles 2b and 2b + 1
    return octets.reshape(-1).view(torch.int32).reshape(rows, words)


def unpack_int4(packed: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Unpack int32 [N, ⌈K/8⌉] into int8 ``shape`` = [N, K].

    Raises:
        ArtifactError: a tensor that is not what ``pack_int4`` makes for this shape.
    """
    rows, columns = (int(extent) for extent in shape)
    expected = (rows, packed_width(columns))
    if packed.dtype != torch.int32 or tuple(packed.shape) != expected:
        raise ArtifactError(
            f"packed 4-bit weights of shape [{rows}, {columns}]: expected torch.int32 "
            f"{list(expected)}, found {packed.dtype} {list(packed.shape)}"
        )
    # A copy, because a view of another item size needs plain strides even for a single item.
    octets = packed.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    nibbles = torch.stack((octets & _NIBBLE, octets >> 4), dim=-1)
    nibbles = nibbles.reshape(rows, expected[1] * VALUES_PER_WORD)
    return nibbles[:, :columns].to(torch.int8) - _OFFSET
