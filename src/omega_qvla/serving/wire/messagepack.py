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
from functools import lru_cache
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


_NUMBERS: dict[int, struct.Struct] = {
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


def _form(tag: int) -> tuple[str, int, int]:
    """What a first byte announces: a kind, the length that is in it, and the bytes of the length
    that follow it.
    """
    if tag <= 0x7F or tag >= 0xE0:
        return "integer", 0, 0
    if tag <= 0x8F:
        return "map", tag & 0x0F, 0
    if tag <= 0x9F:
        return "list", tag & 0x0F, 0
    if tag <= 0xBF:
        return "text", tag & 0x1F, 0
    if tag in _NUMBERS:
        return "number", _NUMBERS[tag].size, 0
    kind, size = _LENGTH_BYTES.get(tag, ("constant" if tag in _CONSTANTS else "refused", 0))
    return kind, 0, size


_FORMS = tuple(map(_form, range(256)))
"""Looked up, because requests are read by code that has fallen out of the caches since the last."""


class _Reader:
    """One pass over the bytes of a message."""

    def __init__(self, data: bytes, bounds: Bounds, restore: Restore) -> None:
        self._data, self._bounds, self._restore = data, bounds, restore
        self._end, self._most = len(data), bounds.values
        self._values = 0
        self.position = 0

    def value(self, depth: int) -> Value:
        """The value that starts here."""
        self._values += 1
        if self._values > self._most:
            raise WireError(f"the message holds more than {self._most} values")
        where = self.position
        if where >= self._end:
            raise self._cut_off(1)
        tag = self._data[where]
        self.position = where + 1
        kind, length, size = _FORMS[tag]
        if size:
            length = int.from_bytes(self._take(size), "big")
        if kind == "text":
            return self._text(length, where)
        if kind == "bytes":
            return self._take(length)
        if kind == "integer":
            return tag if tag <= 0x7F else tag - 0x100
        if kind == "constant":
            return _CONSTANTS[tag]
        if kind == "number":
            return _NUMBERS[tag].unpack(self._take(length))[0]
        if kind == "refused":
            raise WireError(f"at byte {where} is a type that is not accepted (0x{tag:02x})")
        if depth >= self._bounds.depth:
            raise WireError(
                f"at byte {where} containers are nested more than {self._bounds.depth} deep"
            )
        return self._list(length, depth) if kind == "list" else self._map(length, depth)

    def _take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > self._end:
            raise self._cut_off(count)
        self.position = end
        return self._data[start:end]

    def _cut_off(self, count: int) -> WireError:
        return WireError(
            f"at byte {self.position} {count} bytes are announced, "
            f"{self._end - self.position} are left"
        )

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
        left = self._end - self.position
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
    if isinstance(value, str):
        data = _utf8(value)
        pieces += _text_head(len(data)), data
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(cast(bytes, value))
        pieces += _bytes_head(len(data)), data
    elif value is None or isinstance(value, bool):
        pieces.append({None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value])
    elif isinstance(value, int):
        pieces.append(_integer(value))
    elif isinstance(value, float):
        pieces.append(b"\xcb" + struct.pack(">d", value))
    elif isinstance(value, dict | Mapping):  # dict first: asking for a Mapping takes its time
        _write_map(cast(Mapping[Any, Any], value), pieces, substitute)
    elif isinstance(value, list | tuple):
        items = cast(Sequence[Any], value)
        pieces.append(_head(len(items), 0x90, {2: 0xDC, 4: 0xDD}))
        for item in items:
            _write(item, pieces, substitute)
    else:
        _write(substitute(value), pieces, substitute)


def _write_map(mapping: Mapping[Any, Any], pieces: list[bytes], substitute: Substitute) -> None:
    pieces.append(_head(len(mapping), 0x80, {2: 0xDE, 4: 0xDF}))
    for key, item in mapping.items():
        pieces.append(_key(key))
        _write(item, pieces, substitute)


@lru_cache(256)
def _key(key: Any) -> bytes:
    """Every message has the same few."""
    if not isinstance(key, str | bytes):
        raise WireError(f"the key {shown(key)} is neither text nor bytes")
    data = _utf8(key) if isinstance(key, str) else key
    head = _text_head if isinstance(key, str) else _bytes_head
    return head(len(data)) + data


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WireError("a text with a lone surrogate cannot be sent") from error


def _integer(value: int) -> bytes:
    if -0x20 <= value <= 0x7F:
        return (value & 0xFF).to_bytes(1, "big")
    unsigned, signed = (0xCC, 0xCD, 0xCE, 0xCF), (0xD0, 0xD1, 0xD2, 0xD3)
    for tag in unsigned if value > 0 else signed:
        try:
            return bytes([tag]) + _NUMBERS[tag].pack(value)
        except struct.error:
            continue
    raise WireError(f"the integer {shown(value)} has more than 64 bits")


def _text_head(length: int) -> bytes:
    if length < 32:
        return (0xA0 | length).to_bytes(1, "big")
    return _long_head(length, {1: 0xD9, 2: 0xDA, 4: 0xDB})


def _bytes_head(length: int) -> bytes:
    return _long_head(length, {1: 0xC4, 2: 0xC5, 4: 0xC6})


def _head(length: int, short: int, tags: Mapping[int, int]) -> bytes:
    """First bytes of a list or map; ``short`` is the tag that holds a length below 16 itself."""
    return (short | length).to_bytes(1, "big") if length < 16 else _long_head(length, tags)


def _long_head(length: int, tags: Mapping[int, int]) -> bytes:
    """Tag and length, in as many bytes as it needs."""
    for size, tag in tags.items():
        if length < 1 << 8 * size:
            return bytes([tag]) + length.to_bytes(size, "big")
    raise WireError(f"{length} values or bytes in one piece cannot be sent")


def shown(value: Value) -> str:
    """A value in an error message: short, and printable whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
