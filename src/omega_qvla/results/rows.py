"""Reading saved comparisons: the ``rows`` JSON that ``demo`` and ``compare`` write.

Reports never evaluate anything.  What they show comes from a file, so a figure can be drawn again
years later; a value the evaluation did not measure is null there and a dash here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, cast

from omega_qvla.errors import OmegaError

SCHEMA = 1
FOUR_BITS = 5.0
"""Bits per weight, scales included, up to which a method counts as four bits."""


class ReportError(OmegaError):
    """A saved result cannot be read, or a report cannot be made from it."""


@dataclass(frozen=True)
class Result:
    """One row of a saved comparison; None where nothing was measured.

    ``success`` maps tasks to (successes, episodes); ``ci95`` is the interval of ``success_mean``,
    ``error_ci95`` that of ``action_error``, ``error_vs_default`` that of ``error_ratio``, its ratio
    to the default recipe's; ``unseen_ratio`` and ``unseen_ci95`` are its ratio to the error on
    tasks that calibration saw; ``typical_error`` is the error if all observations were as the
    median one, ``typical_ratio`` and ``typical_vs_default`` as those of the whole; ``drift`` maps
    control steps to metres; ``source`` is the file's name where several are read; ``unfinished``
    rows come from a journal.
    """

    policy: str
    recipe: str
    condition: str
    realizable: bool
    success: dict[str, tuple[int, int]]
    success_mean: float | None
    ci95: tuple[float, float] | None
    action_error: float | None
    noise_floor: float | None
    smoothness: float | None
    checkpoint_bytes: int | None
    resident_bytes: int | None
    ms_per_chunk: float | None
    smoke: bool = False
    scope: str | None = None
    paired: Mapping[str, Any] = field(default_factory=dict[str, Any])
    bits_per_weight: float | None = None
    error_ci95: tuple[float, float] | None = None
    error_ratio: float | None = None
    error_vs_default: tuple[float, float] | None = None
    typical_error: float | None = None
    typical_ratio: float | None = None
    typical_vs_default: tuple[float, float] | None = None
    unseen_ratio: float | None = None
    unseen_ci95: tuple[float, float] | None = None
    drift: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    source: str = ""
    unfinished: bool = False

    @property
    def key(self) -> tuple[str, ...]:
        """What two rows must share to be about the same thing."""
        return self.policy, self.recipe, self.condition, self.scope or "all"

    @property
    def episodes(self) -> int:
        """Episodes over all tasks."""
        return sum(episodes for _, episodes in self.success.values())

    @property
    def is_four_bits(self) -> bool:
        """Whether about four bits are stored for every weight."""
        return self.bits_per_weight is not None and self.bits_per_weight <= FOUR_BITS

    @property
    def is_full_precision(self) -> bool:
        """Whether this row is the reference of the others."""
        return self.recipe in ("fp32", "bf16")


def load_results(path: str | Path) -> list[Result]:
    """The rows of a saved comparison, in the file's order.

    Raises:
        ReportError: the file is missing, no JSON, of another schema, empty, or a row lacks a key
            or has a value of the wrong kind.
    """
    source = Path(path)
    try:
        document = json.loads(source.read_text("utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {source}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{source} is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise ReportError(f"{source} is no saved comparison: it has no list of 'rows'")
    if document.get("schema") != SCHEMA:
        raise ReportError(
            f"{source} has schema {document.get('schema')!r}; this version reads {SCHEMA}"
        )
    rows = cast(list[Any], document["rows"])
    if not rows:
        raise ReportError(f"{source} holds no rows")
    return parse_results(rows, str(source))


def parse_results(rows: Any, where: str) -> list[Result]:
    """Rows of a comparison or an evaluation, as they stand in a document.

    Raises:
        ReportError: a row lacks a key or has a value of the wrong kind; names it.
    """
    return [_result(row, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]


def _result(row: Any, where: str) -> Result:
    if not isinstance(row, dict):
        raise ReportError(f"{where}: expected a mapping, got {type(row).__name__}")
    given = cast(dict[str, Any], row)
    try:
        versus = given.get("error_vs_default") or {}
        unseen = given.get("unseen_over_seen") or {}
        return Result(
            policy=str(given["policy"]),
            recipe=str(given["recipe"]),
            condition=str(given["condition"]),
            realizable=bool(given["realizable"]),
            success={str(task): _count(pair) for task, pair in given["success"].items()},
            success_mean=_number(given["success_mean"]),
            ci95=_optional_pair(given["success_ci95"]),
            action_error=_number(given["action_error"]),
            noise_floor=_number(given["noise_floor"]),
            smoothness=_number(given["smoothness"]),
            checkpoint_bytes=_integer(given["checkpoint_bytes"]),
            resident_bytes=_integer(given["resident_bytes"]),
            ms_per_chunk=_number(given["ms_per_chunk"]),
            smoke=bool(given.get("smoke", False)),
            scope=None if given.get("scope") is None else str(given["scope"]),
            paired=_paired(given.get("paired_vs_reference")),
            bits_per_weight=_number(given.get("bits_per_weight")),
            error_ci95=_optional_pair(given.get("action_error_ci95")),
            error_ratio=_number(versus.get("ratio")),
            error_vs_default=_optional_pair(versus.get("ci95")),
            typical_error=_typical(given.get("action_errors")),
            typical_ratio=_number(versus.get("typical_ratio")),
            typical_vs_default=_optional_pair(versus.get("typical_ci95")),
            unseen_ratio=_number(unseen.get("ratio")),
            unseen_ci95=_optional_pair(unseen.get("ci95")),
            drift=_drift(given.get("drift")),
        )
    except KeyError as error:
        raise ReportError(f"{where}: key {error} is missing") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ReportError(f"{where}: a value has the wrong kind: {error}") from error


def _paired(value: Any) -> Mapping[str, Any]:
    """The comparison on the same seeds; empty where there is none."""
    if value is None:
        return {}
    return {
        **value,
        "difference": float(value["difference"]),
        "ci95": _pair(value["ci95"]),
        "mcnemar_p": float(value["mcnemar_p"]),
    }


def _drift(value: Any) -> dict[str, dict[str, float]]:
    entries = {} if value is None else value
    return {
        str(steps): {str(name): float(number) for name, number in entry.items()}
        for steps, entry in entries.items()
    }


def _count(pair: Any) -> tuple[int, int]:
    successes, episodes = (int(number) for number in pair)
    if not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes")
    return successes, episodes


def _pair(interval: Any) -> tuple[float, float]:
    low, high = (float(end) for end in interval)
    return low, high


def _optional_pair(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else _pair(interval)


def _number(value: Any) -> float | None:
    """A measured quantity: none of those in a row can be negative."""
    number = None if value is None else float(value)
    if number is not None and not 0 <= number < math.inf:
        raise ValueError(f"{value} is no measured quantity")
    return number


def _typical(shares: Any) -> float | None:
    """Number times median of what the observations add to an error."""
    return _number(len(shares) * median(shares)) if shares else None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
