"""Messages of the two robot protocols: MessagePack with numpy arrays, bounded.

openpi and Isaac-GR00T both send MessagePack maps in which arrays are maps of a special form.
``messagepack.py`` reads and writes the one within bounds, ``array_forms.py`` the other; here they
are put together.  Whether the numbers make sense (finite, of the right shape) is the
specification's business, not the wire's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from omega_qvla.errors import WireError
from omega_qvla.serving.wire.arrays import DTYPES, Array, gr00t_array, openpi_array, restored
from omega_qvla.serving.wire.messagepack import DEFAULT_BOUNDS, Bounds, Value, read, write

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

ArrayForm = Callable[[Array], dict[Any, Any]]
"""How a dialect writes an array: as a map of plain values."""


def decode(data: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> Value:
    """The value of one message; both dialects' arrays are recognized.

    Returns:
        None, bool, int, float, str, bytes, array, numpy scalar, list, or dict with str or bytes
        keys.  Arrays are read-only.

    Raises:
        WireError: the bytes are not exactly one acceptable message; says what is wrong and where.
    """
    return read(data, bounds, lambda found: restored(found, bounds))


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
        if not isinstance(other, np.ndarray):
            raise WireError(f"a {type(other).__name__} cannot be sent")
        array = cast(Array, other)
        if array.dtype.str not in DTYPES:
            raise WireError(f"an array of dtype {array.dtype} cannot be sent")
        return array_form(array)

    return write(value, substitute)
