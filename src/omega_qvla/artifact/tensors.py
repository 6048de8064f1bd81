"""Tensor files, written and read by the safetensors library; here is what it leaves unchecked.

The library validates a file's header against the file: lengths, shapes, offsets, no gaps.  Here its
tensors are held against those expected, and values that cannot be are found: NaN and Inf, booleans
other than 0 and 1.  Every tensor is then mapped by itself, privately (copy on write): pages come
from the page cache, nothing is copied, no write to a tensor can reach the file, and a tensor that
is dropped gives its pages back, so that whoever repacks weights one by one never holds the file and
the result together.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omega_qvla.artifact.layout import TensorSpec
from omega_qvla.errors import ArtifactError, NonFiniteError
from omega_qvla.files import CHUNK_BYTES, DamageError, Failure, OpenFile

MAX_HEADER_BYTES = 8 << 20
MAX_RANK = 8
MAX_ITEMS = 1 << 40
"""Bound of the product of all extents, zeros counted as ones: what strides are made of."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Every dtype an artifact may hold, by its safetensors name."""
CODES = {dtype: code for code, dtype in DTYPES.items()}

_NAME = re.compile(r"[\x20-\x7e]{1,512}\Z")


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The spec a tensor is stored under.

    Raises:
        ArtifactError: a name, dtype, layout or shape an artifact cannot hold.
    """
    if not _NAME.match(name) or name == "__metadata__":
        raise ArtifactError(f"tensor name {name!r} cannot be stored: use printable ASCII")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in CODES:
        raise ArtifactError(
            f"tensor {name!r} is {tensor.dtype} ({tensor.layout}, {tensor.device}); expected a "
            f"dense tensor with data, of {', '.join(str(dtype) for dtype in CODES)}"
        )
    if not fits(tensor.shape):
        raise ArtifactError(
            f"tensor {name!r} has shape {list(tensor.shape)}; at most {MAX_RANK} extents and "
            f"{MAX_ITEMS} items can be stored"
        )
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def fits(shape: Sequence[int]) -> bool:
    """Whether a shape is one that can be stored."""
    return len(shape) <= MAX_RANK and math.prod(max(n, 1) for n in shape) <= MAX_ITEMS


# --- writing ---------------------------------------------------------------------------------


def assign_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would exceed ``max_bytes``; at least one file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + specs[name].nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += specs[name].nbytes
    return shards


def shard_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of the file that the library writes for these tensors."""
    header: dict[str, object] = {}
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begin, end = end, end + spec.nbytes
        code, shape = CODES[spec.dtype], list(spec.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one tensor file; only its tensors are brought to the CPU.

    Raises:
        NonFiniteError: a floating tensor holds NaN or Inf.
        OSError: it cannot be written.
    """
    held: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().contiguous().cpu()
        _check_finite(name, value)
        # The library refuses two tensors in one piece of memory.
        place = value.untyped_storage().data_ptr()
        held[name] = value.clone() if place in memory else value
        memory.add(place)
    try:
        save_file(held, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise OSError(str(error)) from error
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    os.chmod(path, 0o644)


def _check_finite(name: str, tensor: Tensor) -> None:
    """Refuse to store NaN or Inf, in pieces so that no second tensor of that size is made."""
    if not tensor.is_floating_point():
        return
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK_BYTES):
        finite = torch.isfinite(flat[start : start + CHUNK_BYTES])
        if not bool(finite.all()):
            index = start + int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"tensor {name!r} holds {float(flat[index])} at flat index {index}; "
                "it is not saved: find the site in the quantization report"
            )


# --- reading ---------------------------------------------------------------------------------


class Shard:
    """A tensor file, held against what it has to hold.

    Args:
        file: the file.
        expected: its tensors by name, no more and no fewer.

    Attributes:
        failures: tensors that are missing, additional, misshaped or mistyped; where there is one,
            the file is not read further.

    Raises:
        DamageError: it is no tensor file.
    """

    def __init__(self, file: OpenFile, expected: Mapping[str, TensorSpec]) -> None:
        self.file, self.specs = file, dict(expected)
        header = file.size - sum(spec.nbytes for spec in expected.values())
        # Before the library parses it, which takes some times its bytes.
        length = int.from_bytes(next(file.chunks(0, 8)), "little")
        if length > MAX_HEADER_BYTES:
            raise DamageError(file.name, f"header length {length} exceeds {MAX_HEADER_BYTES}")
        try:
            with safe_open(file.path, framework="numpy") as opened:
                order = opened.offset_keys()
                found = {name: opened.get_slice(name) for name in order}
                kinds = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in found.items()}
        except (SafetensorError, OSError) as error:
            raise DamageError(file.name, f"is no tensor file: {error}") from error
        self.failures = list(_differences(file.name, kinds, expected))
        self._begins: dict[str, int] = {}
        for name in [] if self.failures else order:
            # The library has seen to it that tensors fill the file in this order, without gaps.
            if header % expected[name].dtype.itemsize:
                raise DamageError(file.name, "is not aligned to its items", name)
            self._begins[name] = header
            header += expected[name].nbytes

    def impossible(self) -> Iterator[Failure]:
        """One failure for every tensor that holds a value it cannot have; streams."""
        for name, begin in self._begins.items():
            spec = self.specs[name]
            if not spec.dtype.is_floating_point and spec.dtype != torch.bool:
                continue
            for chunk in self.file.chunks(begin, begin + spec.nbytes):
                if spec.dtype == torch.bool:
                    possible, reason = max(chunk) <= 1, "holds a byte that is neither 0 nor 1"
                else:
                    values = torch.frombuffer(chunk, dtype=spec.dtype)
                    possible, reason = bool(torch.isfinite(values).all()), "holds NaN or Inf"
                if not possible:
                    yield Failure(self.file.name, name, reason)
                    break

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, each mapped by itself.

        Raises:
            DamageError: the file cannot be mapped.
        """
        try:
            return {name: self._map(name, spec) for name, spec in self.specs.items()}
        except (OSError, ValueError) as error:
            raise DamageError(self.file.name, f"cannot be mapped: {error}") from error

    def _map(self, name: str, spec: TensorSpec) -> Tensor:
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)
        begin = self._begins[name]
        before = begin % mmap.ALLOCATIONGRANULARITY  # mappings begin at whole pages
        mapping = mmap.mmap(
            self.file.descriptor,
            before + spec.nbytes,
            access=mmap.ACCESS_COPY,
            offset=begin - before,
        )
        flat = torch.frombuffer(
            mapping, dtype=spec.dtype, count=math.prod(spec.shape), offset=before
        )
        return flat.reshape(spec.shape)


def _differences(
    file: str, found: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, TensorSpec]
) -> Iterator[Failure]:
    """Missing, additional, misshaped and mistyped tensors."""
    for name in sorted({*found, *expected}):
        there = f"{found[name][0]} {list(found[name][1])}" if name in found else "no such tensor"
        wanted = "no such tensor"
        if name in expected:
            wanted = f"{CODES[expected[name].dtype]} {list(expected[name].shape)}"
        if there != wanted:
            yield Failure(file, name, f"expected {wanted}, found {there}")


def digest(file: OpenFile) -> str:
    """SHA-256 of a whole file; streams."""
    found = hashlib.sha256()
    for chunk in file.chunks(0, file.size):
        found.update(chunk)
    return found.hexdigest()
