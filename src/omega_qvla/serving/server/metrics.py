"""Counters, gauges and latency histograms of one server, in a Prometheus registry of its own.

Label values are fixed words of this package, never anything a client sent, so the number of series
is bounded.
"""

from __future__ import annotations

from collections.abc import Callable

from omega_qvla.extras import needing

with needing("serving", "serve"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_PREFIX = "omega_qvla"
BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of the latency buckets, seconds."""

_COUNTERS = {
    "requests_total": ("outcome", "requests by how they ended"),
    "action_violations_total": ("rule", "chunks withheld by the rule they broke"),
    "batches_total": ("size", "forward passes by the number of observations in them"),
    "connections_total": ("event", "connections by what became of them"),
}
_HISTOGRAMS = {
    "queue_seconds": "time between arrival and the start of the computation",
    "inference_seconds": "time of one batch",
    "reply_seconds": "time between arrival and reply",
}
_GAUGES = {
    "waiting": "requests in the queue",
    "open_connections": "connections past their handshake",
}


class Metrics:
    """Thread-safe; one per server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(f"{_PREFIX}_{name}", told, [label], registry=self._registry)
            for name, (label, told) in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(f"{_PREFIX}_{name}", told, buckets=BUCKETS_S, registry=self._registry)
            for name, told in _HISTOGRAMS.items()
        }

    def count(self, name: str, value: str) -> None:
        """One more with this value of the counter's label."""
        self._counters[name].labels(value).inc()

    def counted(self, name: str, value: str) -> int:
        """How many there were."""
        return self.totals(name).get(value, 0)

    def totals(self, name: str) -> dict[str, int]:
        """How many of each value there were."""
        samples = [one for found in self._counters[name].collect() for one in found.samples]
        label = _COUNTERS[name][0]
        counts = {s.labels[label]: int(s.value) for s in samples if s.name.endswith("_total")}
        return dict(sorted(counts.items()))

    def observe(self, name: str, seconds: float) -> None:
        """One more latency in a histogram."""
        self._histograms[name].observe(seconds)

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A value that is read when somebody asks."""
        gauge = Gauge(f"{_PREFIX}_{name}", _GAUGES[name], registry=self._registry)
        gauge.set_function(read)

    def render(self) -> str:
        """The text a Prometheus server reads."""
        return generate_latest(self._registry).decode()
