"""Numpy arrays as the maps that the two robot protocols make of them.

* openpi (``msgpack_numpy.py``): ``{b"__ndarray__": true, b"data": bytes, b"dtype": str,
  b"shape": [int]}``, and for a numpy scalar ``{b"__npgeneric__": true, b"data": value,
  b"dtype": str}``;
* GR00T N1.5 (``eval/service.py``): ``{"__ndarray_class__": true, "as_npy": bytes of a .npy file}``.

A dtype is looked up in a list of booleans, integers and floats of native order: objects, strings
and structures, which make numpy follow pointers, do not exist here.  Shape × item size must be the
number of bytes, exactly.  Arrays are read-only, and cost one copy of their bytes.

The header of a ``.npy`` file is that of ``numpy.lib.format``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import WireError
from omega_qvla.serving.wire.messagepack import Bounds, Value, shown

Array = npt.NDArray[Any]

_DTYPES = {
    spelling: np.dtype(name)
    for spelling, name in (
        ("|b1", "bool"),
        ("|u1", "uint8"),
        ("|i1", "int8"),
        ("<u2", "uint16"),
        ("<i2", "int16"),
        ("<u4", "uint32"),
        ("<i4", "int32"),
        ("<u8", "uint64"),
        ("<i8", "int64"),
        ("<f2", "float16"),
        ("<f4", "float32"),
        ("<f8", "float64"),
    )
}
DTYPES = frozenset(_DTYPES)
"""The dtypes an array may have, as numpy spells them."""


# --- reading ---------------------------------------------------------------------------------


def restored(found: dict[Any, Value], bounds: Bounds) -> Value:
    """The array or numpy scalar that a map stands for, or the map itself.

    Raises:
        WireError: the map has the mark of an array and is none.
    """
    plain = {_plain(key): value for key, value in found.items()}
    if len(plain) != len(found):
        raise WireError("a map has the same key as text and as bytes")
    if "__ndarray__" in plain:
        return _openpi_array(_exactly(plain, "__ndarray__", "data", "dtype", "shape"), bounds)
    if "__npgeneric__" in plain:
        return _openpi_scalar(_exactly(plain, "__npgeneric__", "data", "dtype"))
    if "__ndarray_class__" in plain:
        return _npy_array(_exactly(plain, "__ndarray_class__", "as_npy"), bounds)
    return found


def _plain(key: str | bytes) -> str:
    """openpi's client writes the keys of arrays as bytes."""
    return key if isinstance(key, str) else key.decode("latin-1")


def _exactly(found: dict[str, Value], mark: str, *keys: str) -> list[Value]:
    if found[mark] is not True or set(found) != {mark, *keys}:
        raise WireError(
            f"an array must have the keys {mark} (true), {', '.join(keys)}; found "
            f"{', '.join(shown(key) for key in list(found)[:8])}"
        )
    return [found[key] for key in keys]


def _openpi_array(parts: list[Value], bounds: Bounds) -> Array:
    data, dtype, shape = parts
    if not isinstance(data, bytes) or not isinstance(shape, list):
        raise WireError("an array's data must be bytes and its shape a list")
    return _array(data, _dtype(dtype), cast(list[Value], shape), bounds)


def _openpi_scalar(parts: list[Value]) -> Value:
    data, spelling = parts
    dtype = _dtype(spelling)
    if not isinstance(data, bool | int | float):
        raise WireError(f"a numpy scalar must be a number, found {type(data).__name__}")
    try:
        with np.errstate(over="ignore"):
            return dtype.type(data)
    except (OverflowError, ValueError) as error:
        raise WireError(f"{data!r} is no {dtype.name}") from error


def _dtype(spelling: Value) -> np.dtype[Any]:
    if not isinstance(spelling, str) or spelling not in _DTYPES:
        raise WireError(
            f"dtype {shown(spelling)} is not accepted; accepted are {', '.join(sorted(DTYPES))}"
        )
    return _DTYPES[spelling]


def _array(data: bytes, dtype: np.dtype[Any], shape: Sequence[Value], bounds: Bounds) -> Array:
    """A read-only view of ``data``."""
    if len(shape) > bounds.dimensions:
        raise WireError(
            f"an array has {len(shape)} dimensions, at most {bounds.dimensions} are accepted"
        )
    sizes = [size for size in shape if type(size) is int and 0 <= size <= bounds.message_bytes]
    if len(sizes) != len(shape):
        raise WireError(f"an array's shape must hold sizes, found {shown(list(shape))}")
    expected = math.prod(sizes) * dtype.itemsize
    if expected != len(data):
        raise WireError(
            f"an array of {dtype.name} {sizes} takes {expected} bytes, its data has {len(data)}"
        )
    if dtype == np.bool_ and data.translate(None, b"\0\1"):
        raise WireError("an array of bool holds bytes other than 0 and 1")
    return np.frombuffer(data, dtype).reshape(sizes)


_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([|<][a-z]\d)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,9}(?:, \d{1,9})*)?),?\), ?\} *\n"
)


def _npy_array(parts: list[Value], bounds: Bounds) -> Array:
    """The array of a ``.npy`` file, version 1.0, with the header numpy writes and no other."""
    (file,) = parts
    if not isinstance(file, bytes) or file[:8] != _NPY_MAGIC + b"\x01\x00" or len(file) < 10:
        raise WireError("as_npy must be the bytes of a .npy file, version 1.0")
    end = 10 + int.from_bytes(file[8:10], "little")
    header = _NPY_HEADER.fullmatch(file[10:end])
    if header is None or end > len(file):
        raise WireError("as_npy has a header that numpy does not write for an array of numbers")
    spelling, fortran, sizes = (group.decode("ascii") for group in header.groups())
    shape = [int(size) for size in sizes.split(", ")] if sizes else []
    if fortran == "True":
        return _array(file[end:], _dtype(spelling), shape[::-1], bounds).T
    return _array(file[end:], _dtype(spelling), shape, bounds)


# --- writing ---------------------------------------------------------------------------------


def openpi_array(array: Array) -> dict[Any, Any]:
    """An array as openpi writes it."""
    return {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": list(array.shape),
    }


def gr00t_array(array: Array) -> dict[Any, Any]:
    """An array as GR00T N1.5 writes it."""
    shape = ", ".join(map(str, array.shape)) + ("," if array.ndim == 1 else "")
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': ({shape}), }}"
    padding = -(len(_NPY_MAGIC) + 4 + len(text) + 1) % 64
    header = text.encode("ascii") + b" " * padding + b"\n"
    start = _NPY_MAGIC + b"\x01\x00" + len(header).to_bytes(2, "little")
    return {"__ndarray_class__": True, "as_npy": start + header + array.tobytes()}
