"""GGUF files: settings and tensors in one file, as llama.cpp reads them.

The ``gguf`` package parses the file and knows its quantized formats; what is here turns them into
named float32 tensors.  A tensor's shape in the file counts from the fastest dimension, so a linear
[N, K] is listed as [K, N] and its values are rows of K all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.errors import PolicyError
from omega_qvla.extras import needing


@dataclass(frozen=True)
class GgufFile:
    """What a file holds.

    Attributes:
        settings: by key: numbers, texts, or lists of them.
        tensors: by name, float32, dequantized.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_gguf(path: Path) -> GgufFile:
    """Read a whole file.

    Raises:
        PolicyError: it cannot be read, or is no GGUF file.
        MissingPackageError: ``gguf`` is not installed.
    """
    with needing(f"reading {path.name}", "bench"):
        from gguf import GGUFReader, dequantize
    try:
        reader = GGUFReader(path)
        settings = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            str(tensor.name): torch.from_numpy(
                np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            ).reshape([int(size) for size in reversed(tensor.shape)])
            for tensor in reader.tensors
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise PolicyError(f"{path} cannot be read as a GGUF file: {error}") from error
    return GgufFile(settings, tensors)


def setting(found: GgufFile, key: str, kind: type) -> Any:
    """One setting, of the type it must have.

    Raises:
        PolicyError: it is missing or of another type.
    """
    value = found.settings.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PolicyError(f"the GGUF file has no {key!r} of type {kind.__name__}: {value!r:.60}")
    return value
