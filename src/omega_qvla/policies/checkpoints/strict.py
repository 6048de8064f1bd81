"""Strict loading: every tensor accounted for, or a refusal that names what is wrong.

LeRobot 0.4.4 swallows load errors and runs on random weights; a policy that silently does that
moves a real arm.  Here a module is built on the meta device (nothing allocated, nothing random)
and every one of its tensors must come from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.errors import PolicyError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FLOATS = tuple(_DTYPES.values())
_SHOWN = 8


class Header(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


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


def read_headers(path: Path) -> dict[str, Header]:
    """Shapes and dtypes of all tensors of one safetensors file, without their data.

    Raises:
        PolicyError: the file is missing or not valid safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Header(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.uint8))
                for name, part in parts.items()
            }
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
    headers = {name: Header(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    check_headers(module, headers, dropped=dropped, where=where)
    for name in expected:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise PolicyError(f"{where} does not fit the policy: {name} has NaN or Inf")
    state = {name: tensors[name].to(torch.float32) for name in expected}
    module.load_state_dict(state, strict=True, assign=True)


def check_headers(
    module: nn.Module, found: Mapping[str, Header], *, dropped: set[str], where: str
) -> None:
    """Whether a checkpoint has exactly a module's parameters, by names, shapes and dtypes.

    Raises:
        PolicyError: tensors are missing, unexpected, misshaped or not floating point.
    """
    expected = dict(module.named_parameters())
    problems = [
        f"missing {name} {list(expected[name].shape)}" for name in expected if name not in found
    ]
    problems += [
        f"unexpected {name} {list(found[name].shape)}"
        for name in found
        if name not in expected and name not in dropped
    ]
    for name, parameter in expected.items():
        if name in found:
            problems += _mismatch(name, parameter, found[name])
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PolicyError(f"{where} does not fit the policy: {shown}{more}")


def _mismatch(name: str, parameter: Tensor, found: Header) -> list[str]:
    if found.shape != tuple(parameter.shape):
        return [f"{name} has shape {list(found.shape)}, expected {list(parameter.shape)}"]
    if found.dtype not in _FLOATS:
        return [f"{name} has dtype {found.dtype}, expected a floating-point type"]
    return []
