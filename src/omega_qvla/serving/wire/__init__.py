"""Messages of the two robot protocols: MessagePack with numpy arrays, bounded.

openpi and Isaac-GR00T both send MessagePack maps in which arrays are maps of a special form
(``arrays.py``).  Whoever can reach the socket chooses the bytes, so a message, its texts, its
containers and the number of its values are limited while they are read; extension types, keys that
are neither text nor bytes, keys that appear twice and bytes that are left over are refused.
Whether the numbers make sense (finite, of the right shape) is the specification's business.

The format is MessagePack's (github.com/msgpack/msgpack, ``spec.md``), read and written by the
library ``msgpack``.  It limits every single length and nests 1024 levels at most; the sum of all
values is counted as containers close, and the depth is checked before anything else looks inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from omega_qvla.errors import WireError
from omega_qvla.extras import needing
from omega_qvla.serving.wire.arrays import DTYPES, Array, gr00t_array, openpi_array, restored, shown

with needing("serving", "serve"):
    import msgpack

__all__ = [
    "DEFAULT_BOUNDS",
    "DTYPES",
    "Array",
    "ArrayForm",
    "Bounds",
    "Value",
    "decode",
    "decode_map",
    "encode",
    "gr00t_array",
    "openpi_array",
]

Value = Any
"""None, bool, int, float, str, bytes, array, numpy scalar, list, or dict with str or bytes keys."""
ArrayForm = Callable[[Array], dict[Any, Any]]
"""How a dialect writes an array: as a map of plain values."""


@dataclass(frozen=True)
class Bounds:
    """How large a message may be.

    Attributes:
        message_bytes: the whole message.
        depth: containers inside containers.
        values: scalars, texts and containers, keys included, all together.
        text_bytes: one text.
    """

    message_bytes: int = 16 << 20
    depth: int = 8
    values: int = 4096
    text_bytes: int = 16 << 10


DEFAULT_BOUNDS = Bounds()


def decode(data: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> Value:
    """The value of one message; both dialects' arrays are recognized.

    Returns:
        See ``Value``.  Arrays are read-only.

    Raises:
        WireError: the bytes are not exactly one acceptable message; says what is wrong.
    """
    if len(data) > bounds.message_bytes:
        raise WireError(
            f"the message has {len(data)} bytes, at most {bounds.message_bytes} are accepted"
        )
    left = bounds.values

    def spend(values: int) -> None:
        nonlocal left
        left -= values
        if left < 0:
            raise WireError(f"the message holds more than {bounds.values} values")

    def as_list(items: list[Value]) -> list[Value]:
        spend(1 + len(items))
        return items

    def as_map(pairs: list[tuple[Any, Value]]) -> dict[Any, Value]:
        spend(1 + 2 * len(pairs))
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in found if keys.count(key) > 1)
            raise WireError(f"the key {shown(twice)} appears twice")
        return found

    try:
        value = msgpack.unpackb(
            data,
            list_hook=as_list,
            object_pairs_hook=as_map,
            ext_hook=_refuse_extension,
            strict_map_key=True,
            max_str_len=bounds.text_bytes,
            max_bin_len=bounds.message_bytes,
            max_array_len=bounds.values,
            max_map_len=bounds.values,
            max_ext_len=0,
        )
    except ValueError as error:
        reason = str(error) or "containers are nested too deep"
        raise WireError(f"no message within the limits: {reason}") from error
    return _restored(value, 0, bounds.depth)


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


def encode(value: Value, array_form: ArrayForm = openpi_array) -> bytes:
    """The bytes of one message.

    Raises:
        WireError: a value that no message can hold, such as an array of objects.
    """

    def substitute(other: Value) -> Value:
        if isinstance(other, np.generic):
            return other.item()
        if isinstance(other, Mapping):
            return dict(cast(Mapping[Any, Any], other))
        if not isinstance(other, np.ndarray):
            raise WireError(f"the {type(other).__name__} {shown(other)} cannot be sent")
        array = cast(Array, other)
        if array.dtype.str not in DTYPES:
            raise WireError(f"an array of dtype {array.dtype} cannot be sent")
        return array_form(array)

    try:
        return cast(bytes, msgpack.packb(value, default=substitute))
    except ValueError as error:
        raise WireError(f"a value cannot be sent: {error}") from error


def _restored(value: Value, depth: int, most: int) -> Value:
    """The value with arrays in place of the maps that stand for them."""
    if not isinstance(value, dict | list):
        return value
    if depth == most:
        raise WireError(f"containers are nested more than {most} deep")
    if isinstance(value, list):
        return [_restored(item, depth + 1, most) for item in cast(list[Value], value)]
    found = cast(dict[Any, Value], value)
    return restored({key: _restored(item, depth + 1, most) for key, item in found.items()})


def _refuse_extension(code: int, data: bytes) -> Value:
    raise WireError(f"a value is of the extension type {code}, which is not accepted")
