"""Adaptive-norm modulation as a table over flow time.

Scale, shift and gate of every adaptive norm depend on the flow time t and on nothing else.  An
Euler sampler with n steps only ever asks for t = 1 - i/n, so the dense layers (233 MB of pi0.5 in
bf16) can be replaced by their values at those times.  The table holds the times of several step
counts; those are exact, any other time is interpolated linearly between its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.policies.base import euler_times


@dataclass(frozen=True)
class StepTable:
    """Modulation rows by flow time.

    Attributes:
        times: [R] float64, strictly descending in (0, 1].
        values: [R, norms, 3, D] float32.
    """

    times: Tensor
    values: Tensor

    @classmethod
    def tabulate(
        cls, modulation: Callable[[Tensor], Tensor], step_counts: Iterable[int]
    ) -> StepTable:
        """Evaluate ``modulation`` at every time that samplers with these step counts visit."""
        visited = {t for steps in step_counts for t in euler_times(steps)}
        times = torch.tensor(sorted(visited, reverse=True), dtype=torch.float64)
        with torch.no_grad():
            return cls(times, modulation(times).to(torch.float32))

    def at(self, times: Tensor) -> Tensor:
        """Modulation [T, norms, 3, D] at flow times [T]; ends are held constant."""
        wanted = times.to(torch.float64)
        ascending = self.times.flip(0).contiguous()
        upper = torch.searchsorted(ascending, wanted.contiguous()).clamp(max=len(ascending) - 1)
        lower = (upper - 1).clamp(min=0)
        t0, t1 = ascending[lower], ascending[upper]
        span = (t1 - t0).clamp(min=1e-12)
        weight = ((wanted - t0) / span).clamp(0.0, 1.0)
        nearest = torch.where(weight > 0.5, upper, lower)
        exact = (ascending[nearest] - wanted).abs() < 1e-6
        weight = torch.where(exact, (nearest == upper).to(weight.dtype), weight)
        rows = self.values.flip(0)
        weight = weight.to(rows.dtype).view(-1, 1, 1, 1)
        return torch.where(
            weight == 0, rows[lower], torch.where(weight == 1, rows[upper], torch.lerp(rows[lower], rows[upper], weight))
        )
