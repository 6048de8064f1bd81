"""What stands for CUDA where captured graphs are tested."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from omega_qvla.runtime.graph import Recording


class Recorder:
    """Records work by keeping it, and replays it into the buffer of the first time."""

    def __init__(self, failure: RuntimeError | None = None) -> None:
        self.failure = failure
        self.warmed = self.captured = self.replayed = 0

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        self.warmed += 1
        work()

    def capture(self, work: Callable[[], Tensor]) -> Recording:
        self.captured += 1
        if self.failure is not None:
            raise self.failure
        output = work().clone()

        def replay() -> None:
            self.replayed += 1
            output.copy_(work())

        return Recording(replay, output)
