"""What a layer's activations are rounded with, over flow time.

Calibration leaves a table: for each denoising step a static scale, an offset per channel, a bias
that makes up for the offset, whichever a recipe asks for.  A step is the flow time t it is
evaluated at; between two of them everything is interpolated linearly, and beyond the ends it stays.
Since the bias is linear in the offset, an interpolated pair still belongs together.

Values are given out on the device of the layer, in the layout its kernel reads, so that nothing has
to be computed or sent per call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import place

_REMEMBERED = 256
"""Distinct flow times whose values are kept; a sampler visits ten."""
_REMEMBERED_BYTES = 4 << 20
"""Of one layer's interpolated values."""


@dataclass(frozen=True)
class StepValues:
    """What is used at one flow time, or with steps as the first axis at all calibrated ones.

    Attributes:
        scale: float32, one number; None for one dynamic scale per token.
        offset: float32 [K'], subtracted from transformed inputs before they are rounded; or None.
        bias: float32 [N], added to the product; None where the layer has one for all times.
    """

    scale: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> StepValues:
        """The same with every tensor changed."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return StepValues(**{k: None if v is None else change(v) for k, v in parts.items()})

    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        found = [self.scale, self.offset, self.bias]
        return [tensor for tensor in found if tensor is not None]


_NOTHING = StepValues()


class Schedule:
    """Values at any flow time: exact at calibrated times, linear between, flat beyond.

    Args:
        times: [steps] flow times, descending; None for a layer that depends on none.
        table: the values at these times, [steps, ...]; their dtype and device are kept.
    """

    def __init__(self, times: Tensor | None, table: StepValues = _NOTHING) -> None:
        self._table = table
        self._times: list[float] = []
        if times is not None and table.tensors():
            self._times = times.tolist()
        self._known: dict[float | None, StepValues] = {}
        size = sum(tensor[0].nbytes for tensor in table.tensors())
        self._most = min(_REMEMBERED, max(16, _REMEMBERED_BYTES // max(size, 1)))

    def at(self, time: float | None) -> StepValues:
        """What is used at flow time t (any time when there is a single calibrated step).

        Raises:
            PolicyError: there are several steps and no time.
        """
        if not self._times:
            return _NOTHING
        found = self._known.get(time)
        if found is None:
            if len(self._known) >= self._most:
                self._known.clear()
            found = self._known[time] = self._interpolate(time)
        return found

    def known(self) -> list[Tensor]:
        """The tensors given out so far that are remembered."""
        return [tensor for values in self._known.values() for tensor in values.tensors()]

    def copies(self) -> list[Tensor]:
        """Offsets and biases at the calibrated times."""
        return [values for values in (self._table.offset, self._table.bias) if values is not None]

    def _interpolate(self, time: float | None) -> StepValues:
        if time is None and len(self._times) > 1:
            raise PolicyError(
                "a linear whose activations are rounded per denoising step ran outside any; enter "
                "`with clock.step(i, t):` around each step, or give step_module"
            )
        return self._table.map(place(self._times, 1.0 if time is None else time).of)
