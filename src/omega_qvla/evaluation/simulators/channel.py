"""Messages between the evaluation and its simulator processes: JSON and raw arrays.

A message is a mapping of JSON values in which numpy arrays may stand anywhere.  On the wire:

    u32  length of the header H           little endian
    u64  length of the arrays' bytes B
    H    bytes of UTF-8 JSON: {"arrays": [[dtype, shape], ...], "message": ...}
    B    bytes: the arrays one after the other, C order

An array inside ``message`` is replaced by ``{"$array": index}``.  Only booleans, integers and
floats in native byte order are sent.  Both ends run on one machine and belong to one program; the
checks here turn a torn or foreign message into :class:`ChannelError` rather than defend a network.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

LENGTHS = struct.Struct("<IQ")
"""Of header and arrays, in front of both."""
_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_ARRAY = "$array"
MAX_HEADER_BYTES = 1 << 24
MAX_ARRAY_BYTES = 1 << 30

Array = npt.NDArray[Any]


class ChannelError(ConnectionError):
    """The other end closed the channel, fell silent, or sent something that is no message."""


class Channel:
    """Sends and receives messages over a connected stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        """The descriptor, for ``selectors``."""
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        """Longest silence tolerated inside one message."""
        self._socket.settimeout(seconds)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message.

        Raises:
            ChannelError: the other end is gone.
            TypeError: the message holds something that is neither JSON nor a numeric array.
        """
        payload = encode(message)
        try:
            self._socket.sendall(payload)
        except OSError as error:
            raise ChannelError(f"cannot send: {error}") from error

    def receive(self) -> dict[str, Any]:
        """Wait for one message.

        Raises:
            ChannelError: the channel closed, even between messages, or the bytes are no message.
        """
        header_length, array_length = LENGTHS.unpack(self._read(LENGTHS.size))
        if header_length > MAX_HEADER_BYTES or array_length > MAX_ARRAY_BYTES:
            raise ChannelError(f"refused a message of {header_length} + {array_length} bytes")
        return decode(bytes(self._read(header_length)), self._read(array_length))

    def close(self) -> None:
        """Close this end; the other one sees the end of the stream."""
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        buffer = bytearray(length)
        view, filled = memoryview(buffer), 0
        while filled < length:
            try:
                count = self._socket.recv_into(view[filled:])
            except OSError as error:
                raise ChannelError(f"cannot receive: {error}") from error
            if count == 0:
                raise ChannelError("the other end closed the channel")
            filled += count
        return buffer


def encode(message: Mapping[str, Any]) -> bytes:
    """The bytes of one message, lengths included."""
    arrays: list[Array] = []
    content = _strip(message, arrays)
    described = [[array.dtype.name, list(array.shape)] for array in arrays]
    header = json.dumps({"arrays": described, "message": content}).encode()
    body = b"".join(array.tobytes() for array in arrays)
    return LENGTHS.pack(len(header), len(body)) + header + body


def decode(header: bytes, body: bytearray) -> dict[str, Any]:
    """The message of a header and its arrays' bytes; arrays are views of ``body``.

    Raises:
        ChannelError: anything does not fit together.
    """
    try:
        parsed = json.loads(header)
        arrays = _read_arrays(parsed["arrays"], body)
        message = _restore(parsed["message"], arrays)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ChannelError(f"not a message: {error!r}") from error
    if not isinstance(message, dict):
        raise ChannelError(f"a message must be a mapping, got {type(message).__name__}")
    return cast(dict[str, Any], message)


def _strip(value: Any, arrays: list[Array]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        array = cast(Array, value)
        if array.dtype.name not in _DTYPES:
            raise TypeError(f"arrays of dtype {array.dtype} cannot be sent")
        arrays.append(array)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, Mapping):
        mapping = cast(Mapping[Any, Any], value)
        if _ARRAY in mapping or not all(isinstance(key, str) for key in mapping):
            raise TypeError(f"keys must be strings other than {_ARRAY!r}: {list(mapping)}")
        return {key: _strip(item, arrays) for key, item in mapping.items()}
    if isinstance(value, (list, tuple)):
        return [_strip(item, arrays) for item in cast(Sequence[Any], value)]
    return value


def _restore(value: Any, arrays: list[Array]) -> Any:
    if isinstance(value, dict):
        mapping = cast(dict[str, Any], value)
        if set(mapping) == {_ARRAY}:
            return arrays[mapping[_ARRAY]]
        return {key: _restore(item, arrays) for key, item in mapping.items()}
    if isinstance(value, list):
        return [_restore(item, arrays) for item in cast(list[Any], value)]
    return value


def _read_arrays(described: list[tuple[str, list[int]]], body: bytearray) -> list[Array]:
    arrays: list[Array] = []
    offset = 0
    for name, shape in described:
        if name not in _DTYPES or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ChannelError(f"refused an array of dtype {name!r} and shape {shape!r}")
        dtype, count = np.dtype(name), math.prod(shape)
        if offset + count * dtype.itemsize > len(body):
            raise ChannelError("an array is longer than the message")
        arrays.append(np.frombuffer(body, dtype, count, offset).reshape(shape))
        offset += count * dtype.itemsize
    if offset != len(body):
        raise ChannelError(f"{len(body) - offset} bytes of the message belong to no array")
    return arrays
