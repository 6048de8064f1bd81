"""Adaptive-norm modulation as a table over flow time.

Scale, shift and (for pi0.5) gate of every adaptive norm depend on the flow time t and on nothing
else.  An Euler sampler with n steps only ever asks for t = 1 - i/n, so the dense layers (233 MB of
pi0.5 in bf16) can be replaced by their values at those times.  The table holds the times of several
step counts; those are exact, any other time is interpolated linearly between its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from omega_qvla.policies.base import euler_times

_SAME_TIME = 1e-6
"""Flow times closer than this are one time."""


@runtime_checkable
class HasStepTable(Protocol):
    """A policy whose adaptive norms can be replaced by a table."""

    step_table: StepTable | None

    def tabulate_modulation(self, step_counts: Iterable[int]) -> StepTable:
        """The adaptive norms as a table, exact for these step counts."""
        ...

    def use_step_table(self, table: StepTable) -> None:
        """Read modulation from a table from now on."""
        ...


@dataclass(frozen=True)
class StepTable:
    """Modulation rows by flow time.

    Attributes:
        times: [R] float64, strictly descending in (0, 1].
        values: [R, norms, parts, D] float32; parts are scale and shift, for some families a gate.
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
            # Samplers hand over float32 times, and the embedding of t turns fast enough to tell.
            return cls(times, modulation(times.to(torch.float32)).to(torch.float32))

    def at(self, times: Tensor) -> Tensor:
        """Modulation [T, norms, parts, D] at flow times [T]; ends are held constant."""
        ascending, rows = self.times.flip(0).contiguous(), self.values.flip(0)
        wanted = times.to(torch.float64).contiguous()
        upper = torch.searchsorted(ascending, wanted).clamp(max=len(ascending) - 1)
        lower = (upper - 1).clamp(min=0)
        span = (ascending[upper] - ascending[lower]).clamp(min=_SAME_TIME)
        weight = ((wanted - ascending[lower]) / span).clamp(0.0, 1.0)
        # A time that went through float32 still means the tabulated one: snap to it.
        weight = torch.where((weight * span) < _SAME_TIME, 0.0, weight)
        weight = torch.where(((1.0 - weight) * span) < _SAME_TIME, 1.0, weight)
        mix = weight.to(rows.dtype).view(-1, 1, 1, 1)
        return torch.lerp(rows[lower], rows[upper], mix)
