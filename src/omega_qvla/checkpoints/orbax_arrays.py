"""The arrays of an Orbax step, read piece by piece with tensorstore and without JAX.

**Memory.**  A chunk of an array is decompressed whole, and Orbax writes what one device has of an
array as one chunk, up to 2 GiB.  The layers of a network are stacked along the first axis of one
array, so that a chunk has a part of every layer.  Chunks are therefore read one after the other,
and of all arrays stacked alike as many layers are kept as fit into ``WINDOW_BYTES``: those that are
asked for next.  No more than that, one chunk twice (compressed and not) and one parameter is held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.checkpoints.files import contained_file
from omega_qvla.checkpoints.orbax import ITEM, MANIFEST, TREE, array_paths, zarr_driver
from omega_qvla.checkpoints.stored_tensors import Header
from omega_qvla.errors import PolicyError
from omega_qvla.extras import needing

WINDOW_BYTES = 2 << 30
"""How much of stacked arrays is kept for the layers that come next."""

_NODE_BYTES = 100 << 20
_LEAVES = ("/.zarray", "/zarr.json")
_FAILURES = (ValueError, OSError, RuntimeError)
_TRACE = re.compile(r"\s*\[\w+ ?\w*=.*", re.DOTALL)

Layout = Callable[[Tensor], Tensor]
"""An array, or one of its layers → a parameter; a view wherever that is possible."""


@dataclass(frozen=True)
class _Array:
    header: Header
    chunk: tuple[int, ...]
    handle: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.header.shape) * self.header.dtype.itemsize


class SavedArrays:
    """The arrays of a step, left where they are.

    Args:
        directory: the step.

    Raises:
        PolicyError: a file is missing, damaged or leads out of the directory, or the tree and the
            database do not have the same arrays.
        MissingPackageError: tensorstore is not installed.
    """

    def __init__(self, directory: Path) -> None:
        with needing("reading a JAX checkpoint", "openpi"):
            import tensorstore
        self.where = directory / ITEM
        paths, driver = array_paths(directory), zarr_driver(directory)
        for path in sorted(self.where.rglob("*")):
            if not path.is_dir():
                contained_file(directory, path.relative_to(directory).as_posix())
        database = {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{self.where.resolve()}/"},
            "cache_pool": "cache_pool#nodes",
        }
        context = tensorstore.Context({"cache_pool#nodes": {"total_bytes_limit": _NODE_BYTES}})
        try:
            store = tensorstore.KvStore.open(database, context=context).result()
            keys = [key.decode("utf-8", "replace") for key in store.list().result()]
        except _FAILURES as error:
            raise self._unreadable(MANIFEST, error) from error
        self._require_same(paths.values(), keys)
        for place, end in _places(tensorstore, self.where, context).items():
            file = self.where / place
            if not file.exists() or file.stat().st_size < end:
                raise PolicyError(
                    f"{self.where / MANIFEST} names {place}, which is missing or cut short: copy "
                    "the checkpoint again"
                )
        self._arrays: dict[str, _Array] = {}
        for name, path in paths.items():
            spec = {
                "driver": driver,
                "kvstore": {**database, "path": f"{path}/"},
                "fill_missing_data_reads": False,
                "recheck_cached_data": False,
            }
            try:
                handle = tensorstore.open(spec, open=True, read=True, context=context).result()
            except _FAILURES as error:
                raise self._unreadable(name, error) from error
            self._arrays[name] = self._described(name, handle)
        self.headers: Mapping[str, Header] = {n: each.header for n, each in self._arrays.items()}
        self._windows: dict[str, tuple[int, Tensor]] = {}
        self._lock = Lock()

    def read(self, name: str) -> Tensor:
        """A whole array, as it is stored.

        Raises:
            PolicyError: it cannot be read.
        """
        array = self._arrays[name]
        with self._lock:
            if array.nbytes > WINDOW_BYTES // 4:
                self._windows.clear()
            return self._box(name, [slice(0, size) for size in array.header.shape])

    def read_layer(self, name: str, layer: int) -> Tensor:
        """One layer of a stacked array, as it is stored; not to be written to.

        Raises:
            PolicyError: it cannot be read.
        """
        with self._lock:
            start, kept = self._windows.get(name, (0, None))
            if kept is None or not start <= layer < start + len(kept):
                self._windows.pop(name, None)
                start, kept = layer, self._box(name, self._window(name, layer))
                self._windows[name] = start, kept
            return kept[layer - start]

    def _window(self, name: str, layer: int) -> list[slice]:
        """The layers to be read from this one on; those of arrays stacked otherwise are let go."""
        depth, *sizes = self._arrays[name].header.shape
        alike = {n: a for n, a in self._arrays.items() if a.header.shape[:1] == (depth,)}
        self._windows = {n: window for n, window in self._windows.items() if n in alike}
        fitting = depth * WINDOW_BYTES // max(1, sum(array.nbytes for array in alike.values()))
        stop = min(depth, layer + max(1, fitting))
        return [slice(layer, stop), *(slice(0, size) for size in sizes)]

    def _box(self, name: str, box: Sequence[slice]) -> Tensor:
        """A part of an array, chunk by chunk."""
        array = self._arrays[name]
        pieces = list(_pieces(box, array.chunk))
        try:
            if len(pieces) == 1:
                found = array.handle[pieces[0]].read().result()
            else:
                shape = [part.stop - part.start for part in box]
                found = np.empty(shape, array.handle.dtype.numpy_dtype)
                for piece in pieces:
                    inside = [
                        slice(part.start - whole.start, part.stop - whole.start)
                        for part, whole in zip(piece, box, strict=True)
                    ]
                    found[tuple(inside)] = array.handle[piece].read().result()
        except _FAILURES as error:
            raise self._unreadable(name, error) from error
        if array.header.dtype == torch.bfloat16:  # which numpy has not, and torch does not take
            return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(found)

    def _described(self, name: str, handle: Any) -> _Array:
        dtype = getattr(torch, handle.dtype.name, None)
        if not isinstance(dtype, torch.dtype):
            raise PolicyError(f"{self.where}: {name} has the unknown type {handle.dtype.name}")
        shape, chunk = tuple(handle.shape), tuple(handle.chunk_layout.read_chunk.shape or ())
        return _Array(Header(shape, dtype), chunk, handle)

    def _require_same(self, paths: Iterable[str], keys: Sequence[str]) -> None:
        stored = {key.removesuffix(leaf) for key in keys for leaf in _LEAVES if key.endswith(leaf)}
        listed = set(paths)
        for path in sorted(listed ^ stored):
            raise PolicyError(
                f"{self.where / TREE} lists {path}, which is not there: the checkpoint was not "
                "copied whole"
                if path in listed
                else f"{self.where} holds {path}, which {TREE} does not list: two checkpoints were "
                "mixed"
            )

    def _unreadable(self, name: str, error: BaseException) -> PolicyError:
        reason = _TRACE.sub("", str(error)).strip() or type(error).__name__
        return PolicyError(
            f"cannot read {name} of {self.where}: {reason}. Its files are missing or damaged; copy "
            "the checkpoint again"
        )


@dataclass(frozen=True)
class ArrayPlace:
    """A parameter of the network that is an array, or a part of one.

    Attributes:
        arrays: of the step.
        key: the array's name.
        layer: entry along its first axis; None is all of it.
        layout: that part → the parameter.
    """

    arrays: SavedArrays
    key: str
    layer: int | None
    layout: Layout

    @property
    def file(self) -> Path:
        """The folder of the arrays."""
        return self.arrays.where

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.arrays.headers[self.key].dtype

    @property
    def header(self) -> Header:
        """Shape and type of the parameter."""
        shape = self.arrays.headers[self.key].shape[0 if self.layer is None else 1 :]
        return Header(tuple(self.layout(torch.empty(shape, device="meta")).shape), self.dtype)

    def load(self, rows: slice = slice(None)) -> Tensor:
        """The parameter, or some of its rows, as they are stored; not to be written to.

        Raises:
            PolicyError: it cannot be read.
        """
        if self.layer is None:
            return self.layout(self.arrays.read(self.key))[rows]
        return self.layout(self.arrays.read_layer(self.key, self.layer))[rows]


def _places(tensorstore: Any, where: Path, context: Any) -> dict[str, int]:
    """The files that the database needs, and how far each must reach.

    Raises:
        ValueError: the database is damaged.
    """
    base = tensorstore.KvStore.open(f"file://{where.resolve()}/", context=context).result()
    dump = tensorstore.ocdbt.dump
    ends: dict[str, int] = {}
    versions = dump(base, context=context).result()["versions"]
    nodes = [max(versions, key=lambda version: version["generation_number"])["root"]["location"]]
    while nodes:
        node = nodes.pop()
        _reach(ends, node)
        for entry in dump(base, node, context=context).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                _reach(ends, entry["indirect_value"])
    return ends


def _reach(ends: dict[str, int], location: str) -> None:
    """``kind:base:file:offset:length``, the base a folder that ends in a slash or nothing."""
    _, base, file, offset, length = location.rsplit(":", 4)
    ends[base + file] = max(ends.get(base + file, 0), int(offset) + int(length))


def _pieces(box: Sequence[slice], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """A box cut along the borders of chunks."""
    axes = [
        [
            slice(max(start, part.start), min(start + size, part.stop))
            for start in range(part.start // size * size, part.stop, size)
        ]
        for part, size in zip(box, chunk, strict=True)
    ]
    return product(*axes)
