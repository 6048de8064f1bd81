"""Messages of the two robot protocols: MessagePack with numpy arrays, bounded, code of our own.

openpi and Isaac-GR00T both send MessagePack maps in which arrays are maps of a special form:

* openpi (``msgpack_numpy.py``): ``{b"__ndarray__": true, b"data": bytes, b"dtype": str,
  b"shape": [int]}``, and for a numpy scalar ``{b"__npgeneric__": true, b"data": value,
  b"dtype": str}``;
* GR00T N1.5 (``eval/service.py``): ``{"__ndarray_class__": true, "as_npy": bytes of a .npy file}``.

Whoever can reach the socket chooses these bytes, so nothing is trusted:

* a message, its depth, its number of values and the length of its texts are limited *before*
  anything is allocated for them; an announced length that is longer than the message is an error at
  once, so memory stays proportional to the bytes that really arrived;
* a dtype is looked up in a list of booleans, integers and floats of native order.  Objects, strings
  and structures, which make numpy follow pointers, do not exist here;
* shape × item size must be the number of bytes, exactly;
* keys are texts or bytes, none twice; extension types are refused; every byte must be used.

Arrays are read-only, and cost one copy of their bytes.  Whether the numbers make sense (finite, of
the right shape) is the specification's business, not the wire's.

The format is MessagePack's (github.com/msgpack/msgpack, ``spec.md``), the header of a ``.npy`` file
that of ``numpy.lib.format``.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import WireError

Array = npt.NDArray[Any]
Value = Any
"""None, bool, int, float, str, bytes, array, numpy scalar, list, or dict with str or bytes keys."""

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


@dataclass(frozen=True)
class Bounds:
    """How large a message may be.

    Attributes:
        message_bytes: the whole message.
        depth: containers inside containers.
        values: scalars, texts and containers, keys included, all together.
        text_bytes: one text.
        dimensions: of one array.
    """

    message_bytes: int = 16 << 20
    depth: int = 8
    values: int = 4096
    text_bytes: int = 16 << 10
    dimensions: int = 6


DEFAULT_BOUNDS = Bounds()

ArrayForm = Callable[[Array], dict[Any, Any]]
"""How a dialect writes an array: as a map of plain values."""


# --- reading ---------------------------------------------------------------------------------


def decode(data: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> Value:
    """The value of one message; both dialects' arrays are recognized.

    Raises:
        WireError: the bytes are not exactly one acceptable message; says what is wrong and where.
    """
    if len(data) > bounds.message_bytes:
        raise WireError(
            f"the message has {len(data)} bytes, at most {bounds.message_bytes} are accepted"
        )
    reader = _Reader(data, bounds)
    value = reader.value(0)
    if reader.position != len(data):
        raise WireError(f"{len(data) - reader.position} bytes follow the message")
    return value


def decode_map(data: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> dict[str, Value]:
    """A message that is a map with texts as keys, as every request and reply is.

    Raises:
        WireError: see ``decode``; or it is something else.
    """
    value = decode(data, bounds)
    if not isinstance(value, dict):
        raise WireError(f"the message must be a map, it is a {type(value).__name__}")
    message = cast(dict[Any, Value], value)
    if not all(isinstance(key, str) for key in message):
        raise WireError("the message's keys must be texts")
    return message


_FIXED: dict[int, struct.Struct] = {
    0xCA: struct.Struct(">f"),
    0xCB: struct.Struct(">d"),
    0xCC: struct.Struct(">B"),
    0xCD: struct.Struct(">H"),
    0xCE: struct.Struct(">I"),
    0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"),
    0xD1: struct.Struct(">h"),
    0xD2: struct.Struct(">i"),
    0xD3: struct.Struct(">q"),
}
_CONSTANTS: dict[int, bool | None] = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTH_BYTES: dict[int, tuple[str, int]] = {
    0xC4: ("bytes", 1),
    0xC5: ("bytes", 2),
    0xC6: ("bytes", 4),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("list", 2),
    0xDD: ("list", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}


class _Reader:
    """One pass over the bytes of a message."""

    def __init__(self, data: bytes, bounds: Bounds) -> None:
        self._data, self._bounds = data, bounds
        self._values = 0
        self.position = 0

    def value(self, depth: int) -> Value:
        """The value that starts here."""
        self._values += 1
        if self._values > self._bounds.values:
            raise WireError(f"the message holds more than {self._bounds.values} values")
        where = self.position
        tag = self._take(1)[0]
        if tag <= 0x7F:
            return tag
        if tag >= 0xE0:
            return tag - 0x100
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _FIXED:
            form = _FIXED[tag]
            return form.unpack(self._take(form.size))[0]
        kind, length = self._length(tag, where)
        if kind == "text":
            return self._text(length, where)
        if kind == "bytes":
            return self._take(length)
        if depth >= self._bounds.depth:
            raise WireError(
                f"at byte {where} containers are nested more than {self._bounds.depth} deep"
            )
        return self._list(length, depth) if kind == "list" else self._map(length, depth)

    def _length(self, tag: int, where: int) -> tuple[str, int]:
        """Kind and length of what has one."""
        if tag <= 0x8F:
            return "map", tag & 0x0F
        if tag <= 0x9F:
            return "list", tag & 0x0F
        if tag <= 0xBF:
            return "text", tag & 0x1F
        if tag not in _LENGTH_BYTES:
            raise WireError(f"at byte {where} is a type that is not accepted (0x{tag:02x})")
        kind, size = _LENGTH_BYTES[tag]
        return kind, int.from_bytes(self._take(size), "big")

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise WireError(
                f"at byte {self.position} {count} bytes are announced, "
                f"{len(self._data) - self.position} are left"
            )
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _text(self, length: int, where: int) -> str:
        if length > self._bounds.text_bytes:
            raise WireError(
                f"at byte {where} is a text of {length} bytes, at most {self._bounds.text_bytes} "
                "are accepted"
            )
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise WireError(f"the text at byte {where} is not UTF-8") from error

    def _list(self, length: int, depth: int) -> list[Value]:
        self._announce(length)
        return [self.value(depth + 1) for _ in range(length)]

    def _map(self, length: int, depth: int) -> Value:
        self._announce(2 * length)
        found: dict[Any, Value] = {}
        for _ in range(length):
            where = self.position
            key = self.value(self._bounds.depth)  # a key cannot be a container
            if not isinstance(key, str | bytes):
                raise WireError(f"the key at byte {where} is neither text nor bytes")
            if key in found:
                raise WireError(f"the key {_shown(key)} appears twice")
            found[key] = self.value(depth + 1)
        return _restore(found, self._bounds)

    def _announce(self, values: int) -> None:
        """Every value takes a byte at least: what cannot follow is refused before it is read."""
        left = len(self._data) - self.position
        if values > left:
            raise WireError(
                f"at byte {self.position} {values} values are announced, {left} bytes are left"
            )


def _restore(found: dict[Any, Value], bounds: Bounds) -> Value:
    """The array or numpy scalar that a map stands for, or the map itself."""
    if not found:
        return found
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
            f"{', '.join(_shown(key) for key in list(found)[:8])}"
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
            f"dtype {_shown(spelling)} is not accepted; accepted are {', '.join(sorted(DTYPES))}"
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
        raise WireError(f"an array's shape must hold sizes, found {_shown(list(shape))}")
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


def _shown(value: Value) -> str:
    """A value in an error message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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


def encode(value: Value, array_form: ArrayForm = openpi_array) -> bytes:
    """The bytes of one message.

    Raises:
        WireError: a value that no message can hold, such as an array of objects.
    """
    pieces: list[bytes] = []
    try:
        _write(value, pieces, array_form)
    except RecursionError as error:
        raise WireError("the value is nested too deeply") from error
    return b"".join(pieces)


def _write(value: Value, pieces: list[bytes], form: ArrayForm) -> None:
    if value is None or isinstance(value, bool):
        pieces.append({None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value])
    elif isinstance(value, np.generic):
        _write(value.item(), pieces, form)
    elif isinstance(value, int):
        pieces.append(_integer(value))
    elif isinstance(value, float):
        pieces.append(b"\xcb" + struct.pack(">d", value))
    elif isinstance(value, str):
        data = _utf8(value)
        pieces += _head(len(data), (0xA0, 31), {1: 0xD9, 2: 0xDA, 4: 0xDB}), data
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(cast(bytes, value))
        pieces += _head(len(data), None, {1: 0xC4, 2: 0xC5, 4: 0xC6}), data
    elif isinstance(value, np.ndarray):
        array = cast(Array, value)
        if array.dtype.str not in DTYPES:
            raise WireError(f"an array of dtype {array.dtype} cannot be sent")
        _write(form(array), pieces, form)
    elif isinstance(value, Mapping):
        _write_map(cast(Mapping[Any, Any], value), pieces, form)
    elif isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        pieces.append(_head(len(items), (0x90, 15), {2: 0xDC, 4: 0xDD}))
        for item in items:
            _write(item, pieces, form)
    else:
        raise WireError(f"a {type(value).__name__} cannot be sent")


def _write_map(mapping: Mapping[Any, Any], pieces: list[bytes], form: ArrayForm) -> None:
    pieces.append(_head(len(mapping), (0x80, 15), {2: 0xDE, 4: 0xDF}))
    for key, item in mapping.items():
        if not isinstance(key, str | bytes):
            raise WireError(f"the key {_shown(key)} is neither text nor bytes")
        _write(key, pieces, form)
        _write(item, pieces, form)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WireError("a text with a lone surrogate cannot be sent") from error


def _integer(value: int) -> bytes:
    if -0x20 <= value <= 0x7F:
        return struct.pack("b", value)
    unsigned, signed = (0xCC, 0xCD, 0xCE, 0xCF), (0xD0, 0xD1, 0xD2, 0xD3)
    for tag in unsigned if value > 0 else signed:
        try:
            return bytes([tag]) + _FIXED[tag].pack(value)
        except struct.error:
            continue
    raise WireError(f"the integer {_shown(value)} has more than 64 bits")


def _head(length: int, short: tuple[int, int] | None, tags: Mapping[int, int]) -> bytes:
    """Tag and length of a text, bytes, list or map; ``short`` is (tag, longest length in it)."""
    if short is not None and length <= short[1]:
        return bytes([short[0] | length])
    for size, tag in tags.items():
        if length < 1 << 8 * size:
            return bytes([tag]) + length.to_bytes(size, "big")
    raise WireError(f"{length} values or bytes in one piece cannot be sent")
