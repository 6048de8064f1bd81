"""Counters, gauges and latency histograms, and their Prometheus text.

The exposition format is Prometheus' text format 0.0.4.  Label values are fixed words of this
package, never anything a client sent, so the number of series is bounded.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

_PREFIX = "omega_qvla"
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the latency buckets, seconds."""

_HELP = {
    "requests_total": "requests by how they ended",
    "action_violations_total": "chunks withheld by the rule they broke",
    "batches_total": "forward passes by the number of observations in them",
    "connections_total": "connections by what became of them",
    "queue_seconds": "time between arrival and the start of the computation",
    "inference_seconds": "time of one batch",
    "reply_seconds": "time between arrival and reply",
    "waiting": "requests in the line",
    "waiting_bytes": "bytes of the messages that wait for their answers",
    "connections": "open connections",
}


class Metrics:
    """Thread-safe; one per server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, label: str, value: str) -> None:
        """One more of ``name{label="value"}``."""
        with self._lock:
            self._counts[name, label, value] += 1

    def counted(self, name: str, value: str) -> int:
        """How many there were."""
        return self.totals(name).get(value, 0)

    def totals(self, name: str) -> dict[str, int]:
        """How many of each value there were."""
        with self._lock:
            counts = sorted(self._counts.items())
        return {value: number for (key, _, value), number in counts if key == name}

    def observe(self, name: str, seconds: float) -> None:
        """One more latency in a histogram."""
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(BUCKETS_S) + 1))
            buckets[bisect_left(BUCKETS_S, seconds)] += 1
            self._sums[name] = self._sums.get(name, 0.0) + seconds

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A value that is read when somebody asks."""
        self._gauges[name] = read

    def render(self) -> str:
        """The text a Prometheus server reads."""
        with self._lock:
            counts = sorted(self._counts.items())
            buckets = {name: list(values) for name, values in self._buckets.items()}
            sums = dict(self._sums)
        lines: list[str] = []
        for name in dict.fromkeys(key[0] for key, _ in counts):
            lines += _head(name, "counter")
            lines += [
                f'{_PREFIX}_{name}{{{label}="{value}"}} {number}'
                for (key, label, value), number in counts
                if key == name
            ]
        for name, values in sorted(buckets.items()):
            lines += [*_head(name, "histogram"), *_histogram(name, values, sums[name])]
        for name, read in sorted(self._gauges.items()):
            lines += [*_head(name, "gauge"), f"{_PREFIX}_{name} {read():g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP {_PREFIX}_{name} {_HELP[name]}", f"# TYPE {_PREFIX}_{name} {kind}"]


def _histogram(name: str, values: list[int], total_s: float) -> list[str]:
    lines: list[str] = []
    below = 0
    for bound, number in zip((*BUCKETS_S, float("inf")), values, strict=True):
        below += number
        text = "+Inf" if bound == float("inf") else f"{bound:g}"
        lines.append(f'{_PREFIX}_{name}_bucket{{le="{text}"}} {below}')
    return [*lines, f"{_PREFIX}_{name}_sum {total_s:g}", f"{_PREFIX}_{name}_count {below}"]
