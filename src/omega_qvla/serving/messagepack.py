"""MessagePack, read and written within bounds, by code of our own.

Whoever can reach the socket chooses the bytes, so nothing is trusted: a message, its depth, its
number of values and the length of its texts are limited *before* anything is allocated for them; an
announced length that is longer than the message is an error at once, so memory stays proportional
to the bytes that really arrived.  Keys are texts or bytes, none twice; extension types are refused;
every byte must be used.

Maps that stand for something else, and values that MessagePack does not know, are the business of
two functions that the caller gives (``wire.py``, ``array_forms.py``).

The format is MessagePack's (github.com/msgpack/msgpack, ``spec.md``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from omega_qvla.errors import WireError

Value = Any
"""None, bool, int, float, str, bytes, list, or dict with str or bytes keys; whatever the caller's
functions add to that."""
Restore = Callable[[dict[Any, Value]], Value]
"""What a map stands for, or the map itself."""
Substitute = Callable[[Value], Value]
"""A value of these kinds for one of another; raises ``WireError`` where there is none."""


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

# --- reading ---------------------------------------------------------------------------------


def read(data: bytes, bounds: Bounds, restore: Restore) -> Value:
    """The value of one message.

    Args:
        data: the whole message.
        bounds: how large it may be.
        restore: called with every map that is not empty, the innermost first.

    Raises:
        WireError: the bytes are not exactly one acceptable message; says what is wrong and where.
    """
    if len(data) > bounds.message_bytes:
        raise WireError(
            f"the message has {len(data)} bytes, at most {bounds.message_bytes} are accepted"
        )
    reader = _Reader(data, bounds, restore)
    value = reader.value(0)
    if reader.position != len(data):
        raise WireError(f"{len(data) - reader.position} bytes follow the message")
    return value


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

    def __init__(self, data: bytes, bounds: Bounds, restore: Restore) -> None:
        self._data, self._bounds, self._restore = data, bounds, restore
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
                raise WireError(f"the key {shown(key)} appears twice")
            found[key] = self.value(depth + 1)
        return self._restore(found) if found else found

    def _announce(self, values: int) -> None:
        """Every value takes a byte at least: what cannot follow is refused before it is read."""
        left = len(self._data) - self.position
        if values > left:
            raise WireError(
                f"at byte {self.position} {values} values are announced, {left} bytes are left"
            )


# --- writing ---------------------------------------------------------------------------------


def write(value: Value, substitute: Substitute) -> bytes:
    """The bytes of one message.

    Args:
        value: what it holds.
        substitute: called with every value of a kind that MessagePack does not know.

    Raises:
        WireError: no message can hold this.
    """
    pieces: list[bytes] = []
    try:
        _write(value, pieces, substitute)
    except RecursionError as error:
        raise WireError("the value is nested too deeply") from error
    return b"".join(pieces)


def _write(value: Value, pieces: list[bytes], substitute: Substitute) -> None:
    if value is None or isinstance(value, bool):
        pieces.append({None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value])
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
    elif isinstance(value, Mapping):
        _write_map(cast(Mapping[Any, Any], value), pieces, substitute)
    elif isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        pieces.append(_head(len(items), (0x90, 15), {2: 0xDC, 4: 0xDD}))
        for item in items:
            _write(item, pieces, substitute)
    else:
        _write(substitute(value), pieces, substitute)


def _write_map(mapping: Mapping[Any, Any], pieces: list[bytes], substitute: Substitute) -> None:
    pieces.append(_head(len(mapping), (0x80, 15), {2: 0xDE, 4: 0xDF}))
    for key, item in mapping.items():
        if not isinstance(key, str | bytes):
            raise WireError(f"the key {shown(key)} is neither text nor bytes")
        _write(key, pieces, substitute)
        _write(item, pieces, substitute)


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
    raise WireError(f"the integer {shown(value)} has more than 64 bits")


def _head(length: int, short: tuple[int, int] | None, tags: Mapping[int, int]) -> bytes:
    """Tag and length of a text, bytes, list or map; ``short`` is (tag, longest length in it)."""
    if short is not None and length <= short[1]:
        return bytes([short[0] | length])
    for size, tag in tags.items():
        if length < 1 << 8 * size:
            return bytes([tag]) + length.to_bytes(size, "big")
    raise WireError(f"{length} values or bytes in one piece cannot be sent")


def shown(value: Value) -> str:
    """A value in an error message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
