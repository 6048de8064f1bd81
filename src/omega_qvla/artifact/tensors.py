"""Tensor files: a strict subset of safetensors, written and read without trusting a byte.

Layout (all integers little-endian): 8 bytes header length n, n bytes JSON header, then the data.
The header maps each tensor name to ``{"data_offsets": [begin, end], "dtype": "I32", "shape":
[..]}``, offsets relative to the data, and is padded with spaces so that the data starts at a
multiple of 64.  Tensors follow each other without gaps, largest item size first and by name within
that, so every tensor is aligned to its items.  The safetensors library reads these files as they
are.

Reading validates everything by arithmetic before a byte of data is touched: header length against
the file and a cap, JSON against bounds, dtypes against a list, shape × item size against the
offsets, offsets against each other and the file.  Then the very descriptor that was checked is
mapped privately (copy on write): pages come from the page cache, nothing is copied, and no write
to a tensor can reach the file.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omega_qvla.artifact.strict_json import JsonError, canonical, parse_object
from omega_qvla.errors import ArtifactError, NonFiniteError
from omega_qvla.files import CHUNK_BYTES, DamageError, Failure, OpenFile

ALIGNMENT = 64
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

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NAME = re.compile(r"[\x20-\x7e]{1,512}\Z")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor; ``dtype`` is a key of ``DTYPES``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def is_float(self) -> bool:
        return DTYPES[self.dtype].is_floating_point

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Span:
    """A stored tensor and where its bytes lie in its file."""

    spec: TensorSpec
    begin: int
    end: int


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """The spec a tensor is stored under.

    Raises:
        ArtifactError: a name, dtype, layout or shape an artifact cannot hold.
    """
    if not _NAME.match(name) or name == "__metadata__":
        raise ArtifactError(f"tensor name {name!r} cannot be stored: use printable ASCII")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _CODES:
        raise ArtifactError(
            f"tensor {name!r} is {tensor.dtype} ({tensor.layout}, {tensor.device}); expected a "
            "dense tensor with data, of "
            f"{', '.join(str(dtype) for dtype in _CODES)}"
        )
    if not _fits(tensor.shape):
        raise ArtifactError(
            f"tensor {name!r} has shape {list(tensor.shape)}; at most {MAX_RANK} extents and "
            f"{MAX_ITEMS} items can be stored"
        )
    return TensorSpec(_CODES[tensor.dtype], tuple(tensor.shape))


def parse_spec(entry: Mapping[str, Any]) -> TensorSpec:
    """``dtype`` and ``shape`` of a JSON entry.

    Raises:
        JsonError: not a known dtype, or not a shape.
    """
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise JsonError(f"dtype: expected one of {', '.join(DTYPES)}, found {_short(dtype)}")
    extents = _integers(shape)
    if extents is None or not _fits(extents):
        raise JsonError(
            f"shape: expected at most {MAX_RANK} extents and {MAX_ITEMS} items, "
            f"found {_short(shape)}"
        )
    return TensorSpec(dtype, extents)


def _fits(shape: Sequence[int]) -> bool:
    return len(shape) <= MAX_RANK and math.prod(max(n, 1) for n in shape) <= MAX_ITEMS


def _integers(value: Any) -> tuple[int, ...] | None:
    """A list of non-negative integers as a tuple; None if it is not one (True is not 1)."""
    if not isinstance(value, list):
        return None
    items: list[Any] = value
    if any(type(item) is not int or item < 0 for item in items):
        return None
    return tuple(items)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
    return [_storage_order(shard, specs) for shard in shards]


def _storage_order(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> list[str]:
    return sorted(names, key=lambda name: (-DTYPES[specs[name].dtype].itemsize, name))


def header_bytes(names: Sequence[str], specs: Mapping[str, TensorSpec]) -> bytes:
    """Everything before the data, for tensors stored in the order of ``names``."""
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        spec = specs[name]
        entries[name] = {
            "data_offsets": [offset, offset + spec.nbytes],
            "dtype": spec.dtype,
            "shape": list(spec.shape),
        }
        offset += spec.nbytes
    text = canonical(entries).rstrip()
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    if length > MAX_HEADER_BYTES:
        raise ArtifactError(f"too many tensors for one file ({len(names)}); use smaller shards")
    return length.to_bytes(8, "little") + text.ljust(length)


def write_shard(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, Tensor],
    write: Callable[[memoryview], None],
) -> dict[str, str]:
    """Write one tensor file; one tensor at a time is brought to the CPU.

    Returns:
        SHA-256 of every tensor's bytes.

    Raises:
        NonFiniteError: a floating tensor holds NaN or Inf.
    """
    digests: dict[str, str] = {}
    write(memoryview(header_bytes(names, specs)))
    for name in names:
        tensor = tensors[name].detach().contiguous().cpu()
        # Not reshape: a single item may keep a stride that a view as bytes refuses.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        check_finite(name, flat)
        data = _bytes_of(flat)
        digests[name] = hashlib.sha256(data).hexdigest()
        write(data)
    return digests


def _bytes_of(flat: Tensor) -> memoryview:
    octets: Any = flat.view(torch.uint8).numpy()
    return memoryview(octets)


def check_finite(name: str, flat: Tensor) -> None:
    """Refuse to store NaN or Inf, in pieces so that no second tensor of that size is made."""
    if not flat.is_floating_point():
        return
    for start in range(0, flat.numel(), CHUNK_BYTES):
        finite = torch.isfinite(flat[start : start + CHUNK_BYTES])
        if not bool(finite.all()):
            index = start + int((~finite).nonzero()[0])
            raise NonFiniteError(
                f"tensor {name!r} holds {float(flat[index])} at flat index {index}; "
                "it is not saved: find the site in the quantization report"
            )


# --- reading ---------------------------------------------------------------------------------


def read_header(file: OpenFile) -> dict[str, Span]:
    """The validated table of a tensor file; offsets are from the beginning of the file.

    Raises:
        DamageError: anything at all is not as it must be.
    """
    if file.size < 8:
        raise DamageError(file.name, f"has {file.size} bytes, too few for a tensor file")
    length = int.from_bytes(_read(file, 0, 8), "little")
    start = 8 + length
    if length > MAX_HEADER_BYTES or start > file.size:
        raise DamageError(
            file.name,
            f"header length {length} exceeds the file ({file.size} bytes) or {MAX_HEADER_BYTES}",
        )
    if start % ALIGNMENT:
        raise DamageError(file.name, f"data starts at byte {start}, not a multiple of {ALIGNMENT}")
    try:
        entries = parse_object(_read(file, 8, start))
    except JsonError as error:
        raise DamageError(file.name, f"header: {error}") from error
    spans = {name: _span(file.name, name, entry, start) for name, entry in entries.items()}
    _check_layout(file, spans, start)
    return spans


def _read(file: OpenFile, begin: int, end: int) -> bytes:
    return b"".join(bytes(chunk) for chunk in file.chunks(begin, end))


def _span(file: str, name: str, entry: Any, start: int) -> Span:
    if not _NAME.match(name):
        raise DamageError(file, "header: a tensor name is not printable ASCII", _short(name))
    if not isinstance(entry, dict) or set(entry) != {"data_offsets", "dtype", "shape"}:
        raise DamageError(file, "header: expected data_offsets, dtype and shape", name)
    fields: dict[str, Any] = entry
    try:
        spec = parse_spec(fields)
    except JsonError as error:
        raise DamageError(file, f"header: {error}", name) from error
    offsets = _integers(fields["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[1] - offsets[0] != spec.nbytes:
        raise DamageError(
            file,
            f"header: expected {spec.nbytes} bytes for {spec}, "
            f"found data_offsets {_short(fields['data_offsets'])}",
            name,
        )
    return Span(spec, start + offsets[0], start + offsets[1])


def _check_layout(file: OpenFile, spans: Mapping[str, Span], start: int) -> None:
    """Contiguous, aligned, and exactly as long as the file."""
    position = start
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.begin != position:
            reason = f"expected at data offset {position - start}, found {span.begin - start}"
            raise DamageError(file.name, reason, name)
        if span.begin % DTYPES[span.spec.dtype].itemsize:
            raise DamageError(file.name, f"is not aligned to its {span.spec.dtype} items", name)
        position = span.end
    if position != file.size:
        raise DamageError(file.name, f"expected {position} bytes, found {file.size}")


def find_impossible(file: OpenFile, spans: Mapping[str, Span]) -> Iterator[Failure]:
    """One failure for every tensor that holds a value it cannot have; streams."""
    for name, span in spans.items():
        dtype = DTYPES[span.spec.dtype]
        if not span.spec.is_float and dtype != torch.bool:
            continue
        for chunk in file.chunks(span.begin, span.end):
            if dtype == torch.bool:
                possible, reason = max(chunk) <= 1, "holds a byte that is neither 0 nor 1"
            else:
                values = torch.frombuffer(chunk, dtype=dtype)
                possible, reason = bool(torch.isfinite(values).all()), "holds NaN or Inf"
            if not possible:
                yield Failure(file.name, name, reason)
                break


def file_digest(file: OpenFile) -> str:
    """SHA-256 of a whole file; streams."""
    return _digest(file, 0, file.size)


def tensor_digest(file: OpenFile, span: Span) -> str:
    """SHA-256 of one tensor's bytes; streams."""
    return _digest(file, span.begin, span.end)


def _digest(file: OpenFile, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    for chunk in file.chunks(begin, end):
        digest.update(chunk)
    return digest.hexdigest()


def map_tensors(file: OpenFile, spans: Mapping[str, Span]) -> dict[str, Tensor]:
    """Tensors over private mappings of the file, one each.

    A tensor that is dropped gives its pages back: whoever repacks weights one by one never holds
    the file and the result together.

    Raises:
        DamageError: the file cannot be mapped.
    """
    try:
        return {name: _tensor(file, span) for name, span in spans.items()}
    except (OSError, ValueError) as error:
        raise DamageError(file.name, f"cannot be mapped: {error}") from error


def _tensor(file: OpenFile, span: Span) -> Tensor:
    dtype = DTYPES[span.spec.dtype]
    if span.begin == span.end:
        return torch.empty(span.spec.shape, dtype=dtype)
    first = span.begin - span.begin % mmap.ALLOCATIONGRANULARITY  # mappings begin at whole pages
    length = span.end - first
    mapping = mmap.mmap(file.descriptor, length, access=mmap.ACCESS_COPY, offset=first)
    count = math.prod(span.spec.shape)
    flat = torch.frombuffer(mapping, dtype=dtype, count=count, offset=span.begin - first)
    return flat.reshape(span.spec.shape)
