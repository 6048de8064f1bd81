"""Strict loading: every tensor accounted for, or a refusal that names what is wrong.

LeRobot 0.4.4 swallows load errors and runs on random weights; a policy that silently does that
moves a real arm.  Here a module is built on the meta device (nothing allocated, nothing random)
and every one of its tensors must come from the checkpoint: names, shapes and types are checked
before anything is read, values when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from omega_qvla.checkpoints.stored_tensors import Header, StoredTensors
from omega_qvla.checkpoints.weight_store import MappedWeights
from omega_qvla.errors import PolicyError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 8

Shape = tuple[int, ...]


def map_strictly(
    module: nn.Module, stored: StoredTensors, *, dropped: Mapping[str, Shape]
) -> MappedWeights:
    """A store of a module's parameters, left in their files, after everything else was checked.

    Args:
        module: built on the meta device.
        stored: the checkpoint, under the module's names.
        dropped: what the checkpoint may hold although inference never reads it, and its shapes.

    Raises:
        PolicyError: as ``check_headers``.
    """
    check_headers(module, stored.headers, dropped=dropped, where=stored.where)
    places = {name: stored.places[name] for name, _ in module.named_parameters()}
    return MappedWeights(places, stored.changes)


def dropped_count(stored: StoredTensors, dropped: Mapping[str, Shape]) -> int:
    """How many parameters of a checkpoint inference never reads."""
    return sum(math.prod(stored.headers[name].shape) for name in dropped if name in stored.headers)


def check_headers(
    module: nn.Module,
    found: Mapping[str, Header],
    *,
    dropped: Mapping[str, Shape],
    where: str,
) -> None:
    """Whether a checkpoint has exactly a module's parameters, by names, shapes and dtypes.

    float32 beside one 16-bit type is how openpi stores its policies; two 16-bit types in one
    checkpoint are the mark of a merge gone wrong and are refused.

    Raises:
        PolicyError: tensors are missing, unexpected, misshaped or not floating point, or their
            types do not go together.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    problems = [
        f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found
    ]
    known = {**dropped, **expected}
    for name, header in found.items():
        if name not in known:
            problems.append(f"unexpected {name} {list(header.shape)}")
        else:
            problems += _mismatch(name, known[name], header)
    if not problems:
        problems = _mixture({name: found[name] for name in expected})
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PolicyError(f"{where} does not fit the policy: {shown}{more}")


def _mismatch(name: str, shape: Shape, found: Header) -> list[str]:
    if found.shape != shape:
        return [f"{name} has shape {list(found.shape)}, expected {list(shape)}"]
    if found.dtype not in _FLOATS:
        return [
            f"{name} has dtype {found.dtype}, expected float32, bfloat16 or float16 (a checkpoint "
            "that is quantized already cannot be quantized again: give the original)"
        ]
    return []


def _mixture(found: Mapping[str, Header]) -> list[str]:
    halves: dict[torch.dtype, str] = {}
    for name, header in found.items():
        if header.dtype != torch.float32:
            halves.setdefault(header.dtype, name)
    if len(halves) < 2:
        return []
    listed = " and ".join(f"{dtype} ({name})" for dtype, name in sorted(halves.items(), key=str))
    return [f"tensors are of mixed types, {listed}: store all of them in one"]
