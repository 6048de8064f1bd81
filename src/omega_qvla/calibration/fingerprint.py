"""SHA-256 over the content of observations: equal content, equal digest, wherever it lies.

Every value is fed in with its kind, its size and, for mappings, its sorted keys, so that no two
different contents give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def content_digest(observation: Any) -> bytes:
    """SHA-256 of one observation, 32 bytes."""
    digest = hashlib.sha256()
    _update(digest, observation)
    return digest.digest()


def fingerprint_of(digests: Iterable[bytes]) -> str:
    """SHA-256 over the digests of a sequence of observations, in hexadecimal."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _update(digest: Any, value: Any) -> None:
    """Feed nested observations into a hash, unambiguously."""
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}}}".encode())
        for key in sorted(value, key=str):
            digest.update(f"[{key!r}]".encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"({len(value)})".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        _update(digest, value.tolist())  # its bytes would be addresses
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
