"""Policies whose action head has adaptive norms: their layers, or a table in the place of them.

Scale, shift and gate of an adaptive norm depend on the flow time alone.  A quantized policy stores
a table of them over flow time (``layers/step_table.py``) instead of the layers that compute them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from omega_qvla.checkpoints.weight_store import weights_on
from omega_qvla.policies.layers.step_table import StepTable
from omega_qvla.policies.native import NativePolicy


class AdaptiveNorms(NativePolicy):
    """A native policy with adaptive norms; its network has ``step_modulation``."""

    def __init__(self, *whole: Any, **named: Any) -> None:
        super().__init__(*whole, **named)
        self._modulation: Callable[[Tensor], Tensor] = self.module.step_modulation
        self.step_table: StepTable | None = None

    @property
    @abstractmethod
    def modulation_shape(self) -> tuple[int, int, int]:
        """(norms, parts, D) of one row of modulation."""

    @property
    @abstractmethod
    def modulation_paths(self) -> Sequence[str]:
        """The modules that turn flow time into modulation."""

    @abstractmethod
    def remove_modulation(self) -> None:
        """Take those modules out of the network."""

    def make_schedule(self, times: Tensor) -> Any:
        """The modulation at flow times [S], [S, norms, parts, D]."""
        return self._modulation(times)

    def tabulate_modulation(self, step_counts: Iterable[int]) -> StepTable:
        """The adaptive norms as a table, exact for these step counts and the policy's own."""
        with weights_on(self.module, self.store, self.modulation_paths):
            return StepTable.tabulate(self._modulation, {*step_counts, self.steps})

    def use_step_table(self, table: StepTable) -> None:
        """Read adaptive-norm modulation from a table; the layers that computed it are removed.

        Raises:
            ValueError: the table is not of this network's shape.
        """
        rows = table.times.numel()
        expected = (rows, *self.modulation_shape)
        fits = table.times.ndim == 1 and rows > 0 and tuple(table.values.shape) == expected
        if not fits or table.values.dtype != torch.float32:
            raise ValueError(
                f"step_table.values is {table.values.dtype} {list(table.values.shape)} with times "
                f"{list(table.times.shape)}, expected torch.float32 {list(expected)}"
            )
        if bool((table.times.diff() >= 0).any()):
            raise ValueError("step_table.times must be strictly descending")
        self.remove_modulation()
        self._modulation = table.at
        self.step_table = table
        self._schedules.clear()
