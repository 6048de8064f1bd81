"""Unfinished comparisons: the episodes a journal holds, as a row of results.

``compare`` sums up its episodes when all are done; until then they are in its journals, one JSON
line per finished episode below a header that says what was evaluated.  A crash can tear the last
line, which is then ignored, as the evaluation itself would.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from typing import Any, cast

from omega_qvla.results.rows import ReportError, Result

_SCHEMAS = (1, 2)
"""The second keeps the robot's states as well, which are not shown here."""
_Z_95 = 1.959963984540054
_IDENTITY = ("policy", "recipe", "condition")


def is_journal(content: bytes) -> bool:
    """Whether a file's first line is the header of an episode journal."""
    header = _line(content.split(b"\n", 1)[0])
    return header is not None and "identity" in header and "environment" in header


def read_journal(content: bytes, where: str) -> Result | None:
    """The finished episodes of a journal as one row; None if there are none yet.

    Raises:
        ReportError: another schema, a header without labels, or damage before the last line.
    """
    first, *lines = content.split(b"\n")
    header = _line(first) or {}
    if header.get("schema") not in _SCHEMAS:
        raise ReportError(
            f"{where} has schema {header.get('schema')!r}; this version reads "
            f"{' and '.join(map(str, _SCHEMAS))}"
        )
    identity = header.get("identity")
    if not isinstance(identity, dict) or any(key not in identity for key in _IDENTITY):
        raise ReportError(f"{where}: the journal does not say which {', '.join(_IDENTITY)} it is")
    labels = cast(dict[str, Any], identity)
    episodes: dict[tuple[str, int], tuple[bool, float]] = {}
    for number, line in enumerate(lines[:-1], start=2):
        entry = _line(line)
        if entry is None and number == len(lines):
            continue
        try:
            record = cast(Mapping[str, Any], entry)
            key = str(record["task"]), int(record["seed"])
            episodes.setdefault(key, (bool(record["success"]), float(record["ms_per_chunk"])))
        except (TypeError, KeyError, ValueError) as error:
            raise ReportError(f"{where}: line {number} is damaged ({error!r})") from error
    return _row(labels, episodes) if episodes else None


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % score interval (E. B. Wilson, JASA 22, 1927) of a success rate.

    Written here again because reports know nothing of the evaluation; a test holds the two equal.
    """
    rate, z2 = successes / episodes, _Z_95**2
    centre = rate + z2 / (2 * episodes)
    spread = _Z_95 * math.sqrt(rate * (1 - rate) / episodes + z2 / (4 * episodes**2))
    low, high = (centre - spread) / (1 + z2 / episodes), (centre + spread) / (1 + z2 / episodes)
    return (0.0 if successes == 0 else low, 1.0 if successes == episodes else high)


def _row(
    labels: Mapping[str, Any], episodes: Mapping[tuple[str, int], tuple[bool, float]]
) -> Result:
    counts: dict[str, tuple[int, int]] = {}
    for (task, _), (success, _) in episodes.items():
        solved, count = counts.get(task, (0, 0))
        counts[task] = solved + success, count + 1
    solved = sum(success for success, _ in episodes.values())
    return Result(
        policy=str(labels["policy"]),
        recipe=str(labels["recipe"]),
        condition=str(labels["condition"]),
        realizable=True,
        success=counts,
        success_mean=solved / len(episodes),
        ci95=wilson_interval(solved, len(episodes)),
        action_error=None,
        noise_floor=None,
        smoothness=None,
        checkpoint_bytes=None,
        resident_bytes=None,
        ms_per_chunk=statistics.median(ms for _, ms in episodes.values()),
        smoke=any(count < 100 for _, count in counts.values()),
        scope=None if labels.get("scope") is None else str(labels["scope"]),
        unfinished=True,
    )


def _line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], entry) if isinstance(entry, dict) else None
