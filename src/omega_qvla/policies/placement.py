"""Where the tensors of a policy are while it is quantized on a GPU.

Everything lives on the CPU: the policy, the states between two stages, what is finished.  While a
stage is at work its parameters and buffers are on the GPU (``weights_on``), and so is the state of
the one observation that it runs on (``on_device``).  What a GPU has to hold is therefore one stage
and one observation, however large the policy and however many the observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from omega_qvla.devices import CPU
from omega_qvla.policies.base import Stage, State

T = TypeVar("T")


def moved(value: T, device: torch.device) -> T:
    """The same value with every tensor in it on ``device``; those that are there are not copied."""
    return _mapped(value, lambda tensor: tensor.to(device))


def on_device(stage: Stage, device: torch.device) -> Stage:
    """A stage that computes on ``device`` and takes and gives states on the CPU.

    Most of a state is passed on as it came (a backbone layer adds its keys and values to those of
    the layers before): such tensors are not copied back.
    """
    if device == CPU:
        return stage

    def run(state: State) -> State:
        pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def bring(tensor: Tensor) -> Tensor:
            there = tensor.to(device)
            pairs[id(there)] = (there, tensor)  # both are kept, so no other tensor gets that id
            return there

        def take_back(tensor: Tensor) -> Tensor:
            return pairs[id(tensor)][1] if id(tensor) in pairs else tensor.to(CPU)

        return _mapped(stage.run(_mapped(state, bring)), take_back)

    return replace(stage, run=run)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested mappings, lists, tuples and dataclasses with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _mapped(getattr(value, field.name), change) for field in fields(value)}
        return replace(value, **parts)
    return value
