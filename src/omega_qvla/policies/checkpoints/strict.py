"""Strict loading: every tensor accounted for, or a refusal that names what is wrong.

LeRobot 0.4.4 swallows load errors and runs on random weights; a policy that silently does that
moves a real arm.  Here a module is built on the meta device (nothing allocated, nothing random)
and every one of its tensors must come from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.errors import PolicyError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 8


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped.

    Raises:
        PolicyError: the file is missing or not valid safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"cannot read {path}: {error}") from error


def assign_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], *, dropped: set[str], where: str
) -> None:
    """Give every parameter of a meta-device module its tensor, as float32.

    Args:
        module: built on the meta device.
        tensors: the checkpoint.
        dropped: names the checkpoint may hold that inference never reads.
        where: names the checkpoint in errors.

    Raises:
        PolicyError: tensors are missing, unexpected, misshaped, not floating point or not finite.
    """
    expected = dict(module.named_parameters())
    problems = [
        f"missing {name} {list(expected[name].shape)}" for name in expected if name not in tensors
    ]
    problems += [
        f"unexpected {name} {list(tensors[name].shape)}"
        for name in tensors
        if name not in expected and name not in dropped
    ]
    for name, parameter in expected.items():
        if name in tensors:
            problems += _mismatch(name, parameter, tensors[name])
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PolicyError(f"{where} does not fit the policy: {shown}{more}")
    state = {name: tensors[name].to(torch.float32) for name in expected}
    module.load_state_dict(state, strict=True, assign=True)


def _mismatch(name: str, parameter: Tensor, tensor: Tensor) -> list[str]:
    if tensor.shape != parameter.shape:
        return [f"{name} has shape {list(tensor.shape)}, expected {list(parameter.shape)}"]
    if tensor.dtype not in _FLOATS:
        return [f"{name} has dtype {tensor.dtype}, expected a floating-point type"]
    if not bool(torch.isfinite(tensor).all()):
        return [f"{name} has NaN or Inf"]
    return []
