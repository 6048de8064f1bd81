"""PNG files from pixel arrays, with the standard library alone.

A PNG is a signature and chunks; a chunk is its length, its name, its data and a CRC-32 of name and
data.  IHDR gives size and colour type, IDAT the rows, each preceded by its filter, compressed with
zlib (PNG specification, third edition, W3C 2025, sections 5 and 11).  Every row uses filter 2
("up", the difference from the row above), which suits rendered scenes with large even surfaces.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2


def encode_png(image: npt.NDArray[Any]) -> bytes:
    """The PNG file of an image, uint8 [H, W, 3].

    Raises:
        ValueError: another dtype or shape, or no pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"a picture is uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width, _ = image.shape
    rows = image.reshape(height, width * 3)
    differences = rows - np.concatenate((np.zeros_like(rows[:1]), rows[:-1]))  # modulo 256
    filtered = np.concatenate((np.full((height, 1), _UP, dtype=np.uint8), differences), axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
