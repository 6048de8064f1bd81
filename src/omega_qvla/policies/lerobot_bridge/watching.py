"""One denoising pass of a module, watched: which linears run, when, and what they read.

Those that run inside of the denoising steps are the action head, those that run outside are the
backbone.  What is left in full precision, or left out, has a reason:

* a linear narrower than a block of the transform (64 channels) reads or gives a handful of numbers
  of the robot, takes next to no memory, and its rounding would be in every action;
* a linear of the action head outside of the layers that repeat reads or gives flow time and
  actions: few weights, whose rounding would be in every step;
* one that runs both inside and outside of the steps has no one schedule;
* one that does more than multiply and add, or whose weight is read directly;
* one that is never called (the head of a language model that speaks no words) is left out: the
  module says so by name if it is called after all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.errors import OmegaError, PolicyError
from omega_qvla.policies.denoising_calls import around_method, step_of
from omega_qvla.policies.linear_matching import plainness
from omega_qvla.policies.slots import AbsentLinear, InputNumbers, replace_everywhere

NARROW = 64
"""Channels of a block of the transform."""

_REPEATED = re.compile(r"\.\d+\.")
"""In the path of what is in one of several layers."""

Run = Callable[[nn.Module], Tensor]
"""Makes one sample of the module, always the same one."""


@dataclass(frozen=True)
class Left:
    """Linears that are not quantized, and why."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Watched:
    """What a pass has shown.

    Attributes:
        steps: denoising steps.
        once: linears of the backbone, in the order of the module.
        per_step: linears of the action head.
        kept: linears in full precision.
        absent: linears that are left out.
    """

    steps: int
    once: tuple[str, ...]
    per_step: tuple[str, ...]
    kept: tuple[Left, ...]
    absent: tuple[str, ...]


@dataclass
class _Seen:
    inside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0


def watch(module: nn.Module, step: str, run: Run) -> Watched:
    """Make one sample and sort the linears of a module; its absent ones are taken out of it.

    Args:
        module: changed: linears that are never called lose their weights.
        step: submodule, or method of one, that is called once per denoising step.
        run: makes the sample.

    Raises:
        PolicyError: nothing of the name ``step`` is called.
    """
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    seen, actions = _pass(module, step, run)
    if not seen.steps:
        raise PolicyError(f"{step!r}, which LeRobot calls once per denoising step, was not called")
    widths = _widths(linears, seen.inputs)
    once: list[str] = []
    per_step: list[str] = []
    absent: list[str] = []
    kept: dict[str, list[str]] = {}
    for name, linear in linears.items():
        parent = module.get_submodule(name.rpartition(".")[0])
        reason = _first_clause(plainness(parent, linear))
        inside, outside = seen.inside[name], seen.outside[name]
        if reason is None and not inside and not outside:
            absent.append(name)
        elif reason is None and inside and outside:
            kept.setdefault("run inside and outside of the denoising steps", []).append(name)
        elif reason is None and min(linear.in_features, widths[name]) < NARROW:
            kept.setdefault(f"narrower than {NARROW} channels", []).append(name)
        elif reason is None and inside and not _REPEATED.search(name):
            kept.setdefault("in a denoising step, outside of its layers", []).append(name)
        elif reason is not None:
            kept.setdefault(reason, []).append(name)
        else:
            (per_step if inside else once).append(name)
    if not _leave_out(module, absent, run, actions):
        kept["never called, but their weights are read"] = absent
        absent = []
    return Watched(
        steps=seen.steps,
        once=tuple(once),
        per_step=tuple(per_step),
        kept=tuple(Left(reason, tuple(names)) for reason, names in kept.items()),
        absent=tuple(absent),
    )


def leave_out(module: nn.Module, names: Sequence[str]) -> None:
    """Take the weights of linears away."""
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replace_everywhere(module, linear, AbsentLinear(name, linear))


def _pass(module: nn.Module, step: str, run: Run) -> tuple[_Seen, Tensor]:
    seen, numbers = _Seen(), InputNumbers()
    found = step_of(module, step)
    if found is None:
        raise PolicyError(f"LeRobot's module has no {step!r}: it is not the one that was tried")
    depth = 0

    def one_step(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        seen.steps += 1
        depth += 1
        try:
            return compute(*args, **kwargs)
        finally:
            depth -= 1

    def linear(name: str, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (seen.inside if depth else seen.outside)[name] += 1
        x = args[0] if args else kwargs["input"]
        seen.inputs.setdefault(name, []).append(numbers.number_of(x))
        return compute(*args, **kwargs)

    with ExitStack() as stack, torch.no_grad():
        for name, child in module.named_modules():
            if isinstance(child, nn.Linear):
                stack.enter_context(around_method(child, "forward", _named(linear, name)))
        stack.enter_context(around_method(*found, one_step))
        return seen, run(module)


def _first_clause(reason: str | None) -> str | None:
    """A reason without the remedy, which is for modules of one's own."""
    return None if reason is None else reason.partition(":")[0]


def _named(around: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda compute, *args, **kwargs: around(name, compute, *args, **kwargs)


def _widths(
    linears: Mapping[str, nn.Linear], inputs: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Outputs of every linear, those of all that read the same tensors together."""
    together: Counter[tuple[int, ...]] = Counter()
    for name, numbers in inputs.items():
        together[tuple(numbers)] += linears[name].out_features
    return {
        name: together[tuple(inputs[name])] if name in inputs else linear.out_features
        for name, linear in linears.items()
    }


def _leave_out(module: nn.Module, names: Sequence[str], run: Run, expected: Tensor) -> bool:
    """Whether the module gives the same actions without these linears; they are back if not."""
    there = {name: module.get_submodule(name) for name in names}
    leave_out(module, names)
    try:
        with torch.no_grad():
            if torch.equal(run(module), expected):
                return True
    except OmegaError:
        pass
    for name, linear in there.items():
        replace_everywhere(module, module.get_submodule(name), linear)
    return False
