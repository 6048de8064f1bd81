"""When a request would be answered, by how long batches took: pure arithmetic, no clock.

A batch of n observations is expected to take the median of the last ones of that size, so that one
that took unusually long changes nothing.  Of a size that was not measured yet the next smaller one
stands in, which takes no longer: the forecast is then early rather than late, and nobody is refused
on a guess.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED = 15
"""Batches of one size.  An odd number: the median is one of them."""


class Forecast:
    """How long batches take, as far as it was measured.

    Args:
        batch: observations in one at most.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._taken: dict[int, deque[float]] = {}
        self._expected: dict[int, float] = {}

    def record(self, size: int, seconds: float) -> None:
        """A batch of this size took so long."""
        taken = self._taken.setdefault(size, deque(maxlen=_REMEMBERED))
        taken.append(seconds)
        self._expected[size] = median(taken)

    def seconds(self, size: int) -> float:
        """What a batch of this size is expected to take; 0 where nothing is known."""
        known = max((other for other in self._expected if other <= size), default=None)
        return 0.0 if known is None else self._expected[known]

    def wait_s(self, ahead: int) -> float:
        """From when a batch can begin to the answer of a request behind so many others."""
        whole, rest = divmod(ahead + 1, self._batch)
        return whole * self.seconds(self._batch) + (self.seconds(rest) if rest else 0.0)
