"""JSON from a file that nobody vouches for.

The standard parser takes anything: duplicate keys (the last one wins silently), NaN, and documents
whose objects take a hundred times the bytes of their text.  An artifact's JSON is bounded before it
is parsed: its size by the reader that opens it, its number of structural characters here.

``canonical`` is the one way this package writes JSON: sorted keys, ASCII, two spaces, a final
newline, no NaN.  The same value always gives the same bytes.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_TOKENS = 400_000
"""Structural characters per document: bounds the objects that parsing can create."""


class JsonError(ValueError):
    """A document that is not acceptable JSON; the message is the reason."""


def canonical(value: Any) -> bytes:
    """The bytes of ``value``.

    Raises:
        JsonError: something JSON cannot hold, NaN and Inf included.
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise JsonError(str(error)) from error
    return text.encode("ascii") + b"\n"


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises:
        JsonError: not UTF-8, not JSON, not an object, too deep, too many elements, a duplicate
            key, or a number that is not finite.
    """
    if sum(data.count(token) for token in b'"\\[]{},') > MAX_TOKENS:
        raise JsonError(f"more than {MAX_TOKENS} elements")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate fails here
    except JsonError:
        raise
    except RecursionError as error:
        raise JsonError("nested too deep") from error
    except ValueError as error:
        raise JsonError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise JsonError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise JsonError(f"duplicate key {key[:100]!r}")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"number {text[:40]} is not finite")
    return value
