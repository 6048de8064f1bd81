"""Flow time: which denoising step is computed, which times are one, what lies between two of them.

A policy integrates a velocity field from noise (t = 1) to actions (t = 0).  What is calibrated or
tabulated per denoising step is known at the flow times of these steps.  At a time that is one of
them it is exactly that; between two of them it is interpolated linearly, beyond the ends it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

SAME_TIME = 1e-6
"""Flow times that are no further apart are one time: stored in float32, one comes out a little
different."""


@dataclass
class FlowClock:
    """The denoising step now being computed, or none outside the sampling loop.

    ``with clock.step(i, t):`` is entered once per denoising step; ``i`` counts from 0 and ``t`` is
    the flow time in [0, 1] at which the velocity is evaluated.
    """

    index: int | None = field(default=None, init=False)
    time: float | None = field(default=None, init=False)

    @contextmanager
    def step(self, index: int, time: float) -> Iterator[None]:
        """Mark everything computed inside the block as denoising step ``index`` at ``time``."""
        outer = (self.index, self.time)
        self.index, self.time = index, float(time)
        try:
            yield
        finally:
            self.index, self.time = outer


def euler_times(steps: int) -> list[float]:
    """Flow times at which an Euler sampler of ``steps`` steps evaluates the velocity, 1 first."""
    if steps < 1:
        raise ValueError(f"number of denoising steps must be at least 1, got {steps}")
    return [1.0 - i / steps for i in range(steps)]


class Between(NamedTuple):
    """A place in a table over flow time: ``share`` of the way from row ``low`` to row ``high``."""

    low: int
    high: int
    share: float

    def of(self, table: Tensor) -> Tensor:
        """What a table [T, ...] has there, [...]; a row itself where it is one."""
        if self.low == self.high:
            return table[self.low]
        low, high = table[self.low].to(torch.float64), table[self.high].to(torch.float64)
        return (low + (high - low) * self.share).to(table.dtype)


def place(times: Sequence[float], t: float) -> Between:
    """Where a flow time is among those of a table.

    Args:
        times: [T], strictly descending.
        t: the flow time.

    Raises:
        ValueError: t is not a number.
    """
    if math.isnan(t):
        raise ValueError("the flow time is not a number")
    for row, time in enumerate(times):
        if abs(t - time) <= SAME_TIME or (t > time and row == 0):
            return Between(row, row, 0.0)
        if t > time:
            return Between(row, row - 1, (t - time) / (times[row - 1] - time))
    return Between(len(times) - 1, len(times) - 1, 0.0)
