"""The denoising steps of a sample function that is not ours: counted, and checked.

Scales, offsets and biases of the action head are looked up by flow time.  A sample that enters the
clock too seldom, twice, or at times that cannot be meant would compute with the values of another
step, so it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock

_CONTRACT = "enter `with clock.step(i, t):` once per step, i = 0 … steps - 1, t in [0, 1]"


class RecordingClock(FlowClock):
    """A clock that remembers how it was entered since ``forget``."""

    index: int | None
    time: float | None

    def __init__(self) -> None:
        super().__init__()
        self._entered: list[tuple[int, float]] = []

    @contextmanager
    def step(self, index: int, time: float) -> Iterator[None]:
        self._entered.append((int(index), float(time)))
        with super().step(int(index), float(time)):
            yield

    def forget(self) -> None:
        """Begin a new sample, outside of any step."""
        self._entered.clear()
        self.index = self.time = None

    def check(self, steps: int, step_module: str | None, linear: str) -> None:
        """Whether one sample was what its policy says of it.

        Args:
            steps: as the policy says.
            step_module: what counts the steps, if ``sample`` does not.
            linear: one that depends on them, for messages.

        Raises:
            PolicyError: the clock was not entered for the steps 0 … steps - 1 in this order, or
                their flow times are outside [0, 1] or do not rise or fall all the way.
        """
        if not self._entered and step_module is not None:
            raise PolicyError(
                f"step_module {step_module!r} was never called in a sample; name the module, or "
                "the method of one ('model.denoise_step'), that is called once per denoising step, "
                "or enter `with clock.step(i, t):` in sample"
            )
        if not self._entered:
            raise PolicyError(
                f"{linear!r} belongs to the action head, but sample never entered a denoising "
                f"step; {_CONTRACT}, or give step_module"
            )
        numbers = [index for index, _ in self._entered]
        if numbers != list(range(steps)):
            raise PolicyError(
                f"steps={steps}, but sample entered the clock {len(numbers)} times, with the step "
                f"numbers {_short(numbers)}; {_CONTRACT}. A policy that answers from a queue has "
                "to be reset in sample"
            )
        times = [time for _, time in self._entered]
        if not all(math.isfinite(time) and 0.0 <= time <= 1.0 for time in times):
            raise PolicyError(f"flow times {_short(times)} are not all in [0, 1]; {_CONTRACT}")
        if times not in (sorted(set(times)), sorted(set(times), reverse=True)):
            raise PolicyError(
                f"flow times {_short(times)} neither rise nor fall from step to step; {_CONTRACT}, "
                "a time of its own for every step"
            )


def _short(values: list[Any], most: int = 12) -> str:
    text = ", ".join(f"{value:.6g}" for value in values[:most])
    return f"[{text}, …]" if len(values) > most else f"[{text}]"


def step_of(module: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """Where a denoising step is: a submodule and the name of its method, ``forward`` by default.

    None: there is no such submodule, and no such method of one.
    """
    modules = dict(module.named_modules())
    if path and path in modules:
        return modules[path], "forward"
    parent, _, method = path.rpartition(".")
    owner = modules.get(parent)
    if owner is None or not callable(getattr(owner, method, None)):
        return None
    return owner, method


@contextmanager
def steps_by_calls(module: nn.Module, path: str, clock: FlowClock, steps: int) -> Iterator[None]:
    """Inside the block, the n-th call of what ``path`` names is denoising step n, t = 1 - n/steps.

    Raises:
        PolicyError: at a call beyond the last step, or there is nothing of this name.
    """
    found = step_of(module, path)
    if found is None:
        raise PolicyError(f"step_module {path!r} is not a submodule, nor a method of one")
    calls = 0

    def one_step(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls >= steps:
            raise PolicyError(
                f"step_module {path!r} was called more than {steps} times in one sample; "
                "set steps= to the number of denoising steps"
            )
        number, calls = calls, calls + 1
        with clock.step(number, 1.0 - number / steps):
            return compute(*args, **kwargs)

    with around_method(*found, one_step):
        yield


@contextmanager
def around_method(module: nn.Module, method: str, around: Callable[..., Any]) -> Iterator[None]:
    """Inside the block ``module.method(...)`` computes ``around(method, ...)``.

    For ``forward`` that is ``module(...)`` as well.  Hooks would not see a method that is called by
    its name.  Afterwards the module is as it was.
    """
    own = vars(module).get(method)
    compute = getattr(module, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        return around(compute, *args, **kwargs)

    vars(module)[method] = call
    try:
        yield
    finally:
        if own is None:
            del vars(module)[method]
        else:
            vars(module)[method] = own
