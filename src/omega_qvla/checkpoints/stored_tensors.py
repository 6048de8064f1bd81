"""safetensors checkpoints of one file or many: what they hold and where, without reading it.

A sharded checkpoint has an index, ``model.safetensors.index.json``, whose ``weight_map`` gives the
file of every tensor.  Index and files are two sources for the same fact, and they are compared: a
tensor must be in exactly the file that the index names, and in no other.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from omega_qvla.checkpoints.files import (
    contained_file,
    read_json,
    refuse_pointer,
    refuse_unsafe,
)
from omega_qvla.checkpoints.weight_store import Change, Place, SafetensorsPlace
from omega_qvla.errors import PolicyError
from omega_qvla.files import new_file

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

_SHOWN = 5
_PARTIAL = re.compile(r".*\.(incomplete|partial|part|aria2|crdownload|tmp)$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensors:
    """A checkpoint's tensors by name.

    Attributes:
        where: names the checkpoint in errors.
        headers: shape and dtype of every tensor, as it is stored.
        places: the file of every tensor, and its name there.
        changes: what is done to some of them when they are read.
        decisions: what was decided about the tensors, question → answer, for the user to check.
    """

    where: str
    headers: Mapping[str, Header]
    places: Mapping[str, Place]
    changes: Mapping[str, Change] = field(default_factory=dict[str, Change])
    decisions: Mapping[str, str] = field(default_factory=dict[str, str])

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same tensors under other names.

        Raises:
            PolicyError: two tensors get the same name.
        """
        names = {old: rename(old) for old in self.headers}
        if len(set(names.values())) < len(names):
            seen: dict[str, str] = {}
            for old, new in names.items():
                if new in seen:
                    raise PolicyError(f"{self.where} holds {new} twice, as {seen[new]} and {old}")
                seen[new] = old
        return replace(
            self,
            headers={names[old]: header for old, header in self.headers.items()},
            places={names[old]: place for old, place in self.places.items()},
            changes={names[old]: change for old, change in self.changes.items()},
        )


def has_safetensors(directory: Path) -> bool:
    """Whether a directory has weights in safetensors, in one file or in shards."""
    return any((directory / name).exists() for name in (WEIGHTS, INDEX))


def find_tensors(directory: Path) -> StoredTensors:
    """The tensors of a policy directory, in one file or in shards.

    Raises:
        PolicyError: there are no safetensors, or two sets of them; a file is missing, damaged or
            half-downloaded, or leads out of the directory; index and files disagree.
    """
    single, sharded = (_present(directory / name) for name in (WEIGHTS, INDEX))
    if single and sharded:
        raise PolicyError(
            f"{directory} holds both {WEIGHTS} and {INDEX}, and they may differ: remove one"
        )
    if sharded:
        return _read_index(directory)
    if single:
        return read_file(contained_file(directory, WEIGHTS))
    partial = [p.name for p in directory.iterdir() if _PARTIAL.match(p.name)]
    if partial:
        raise PolicyError(
            f"{directory} has no {WEIGHTS}, but {partial[0]}: the download was not finished; run "
            "it again"
        )
    refuse_unsafe(directory)
    raise PolicyError(f"{directory} has neither {WEIGHTS} nor {INDEX}")


def read_file(path: Path) -> StoredTensors:
    """The tensors of one safetensors file.

    Raises:
        PolicyError: the file is missing, damaged or half-downloaded.
    """
    headers: dict[str, Header] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in _DTYPES:
                    raise PolicyError(f"{path}: {name} is of type {kind}, which is not known")
                headers[name] = Header(tuple(part.get_shape()), _DTYPES[kind])
    except (OSError, SafetensorError) as error:
        raise PolicyError(_unreadable(path, error)) from error
    return StoredTensors(
        str(path), headers, {name: SafetensorsPlace(path, name) for name in headers}
    )


def _read_index(directory: Path) -> StoredTensors:
    where = directory / INDEX
    shards = _weight_map(directory)
    headers: dict[str, Header] = {}
    places: dict[str, Place] = {}
    for shard in sorted(set(shards.values())):
        found = read_file(_shard(directory, shard))
        for name, header in found.headers.items():
            if name in places:
                raise PolicyError(f"{where}: {name} is in {places[name].file.name} and in {shard}")
            if name not in shards:
                raise PolicyError(f"{where} does not list {name}, which is in {shard}")
            headers[name], places[name] = header, found.places[name]
    astray = [
        f"{name} is in {places[name].file.name}, the index says {shard}"
        if name in places
        else f"{name} is not in {shard}"
        for name, shard in shards.items()
        if name not in places or places[name].file.name != shard
    ]
    if astray:
        more = f"; and {len(astray) - _SHOWN} more" if len(astray) > _SHOWN else ""
        raise PolicyError(f"{where} does not fit its shards: {'; '.join(astray[:_SHOWN])}{more}")
    return StoredTensors(str(where), headers, places)


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name → name of its file."""
    where, content = directory / INDEX, read_json(directory, INDEX)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise PolicyError(f"{where} has no 'weight_map' of tensor names to files")
    for name, shard in shards.items():
        plain = isinstance(shard, str) and "/" not in shard and shard.endswith(".safetensors")
        if not plain:
            raise PolicyError(
                f"{where}: {name} is said to be in {shard!r}; a shard is a .safetensors file of "
                "the same directory"
            )
    return shards


def _shard(directory: Path, name: str) -> Path:
    if not _present(directory / name):
        raise PolicyError(
            f"{directory / INDEX} names {name}, which is not there: the download is incomplete; "
            "run it again"
        )
    return contained_file(directory, name)


def _unreadable(path: Path, error: BaseException) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        refuse_pointer(path, file.read(64))
        return (
            f"cannot read {path}: {error}. Its {path.stat().st_size} bytes are damaged or "
            "half-downloaded; download it again"
        )
    return f"cannot read {path}: {error}"


def _present(path: Path) -> bool:
    """Whether the name exists, be it a dangling link (which is then refused as such)."""
    return path.exists() or path.is_symlink()


def write_weights(module: nn.Module, directory: Path, dtype: torch.dtype) -> None:
    """Write a module's tensors as one file, in ``dtype``; the file appears whole or not at all."""
    tensors = {
        name: tensor.detach().to(dtype).contiguous() for name, tensor in module.state_dict().items()
    }
    with new_file(directory / WEIGHTS) as partial:
        save_file(tensors, partial)
