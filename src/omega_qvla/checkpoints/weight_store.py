"""Weights that stay where they are until somebody computes with them.

Full-size pi0.5 takes 13 GB in float32, more than the machines it is quantized on should need.  Its
module is therefore built on the meta device, without memory, and a *store* gives the value of any
parameter by name.  ``weights_on`` puts the parameters below some paths into the module while a
piece of the network runs, and takes them out again: what is resident is one layer.  It is also what
brings a layer to a GPU, of a policy in memory as well (``placement.py``).

Two stores exist: files, where every parameter has a place (in a safetensors file, read through a
memory map that is closed after every tensor, or in the arrays of ``orbax.py``); and seeded random
values, drawn tensor by tensor, so that a random policy of full size never exists as a whole.  What
is to be done to a parameter of a file before it is used (an adapter folded in) is done when it is
read, and takes no more memory than that parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.errors import NonFiniteError, PolicyError

_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


class WeightStore(Protocol):
    """Parameters by name."""

    def read(self, name: str) -> Tensor:
        """One parameter, float32, owned by the caller."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """A type that holds one parameter as it is: float32, or the 16 bits it was stored in."""
        ...


class Place(Protocol):
    """Where a tensor is."""

    @property
    def file(self) -> Path:
        """The file or directory it is in."""
        ...

    @property
    def key(self) -> str:
        """Its name there."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored.

        Raises:
            PolicyError: the file cannot be read any more.
        """
        ...

    def load(self, rows: slice = slice(None)) -> Tensor:
        """The tensor, or some of its rows, as they are stored.

        Raises:
            PolicyError: the file cannot be read any more.
        """
        ...


class SafetensorsPlace(NamedTuple):
    """A tensor of a safetensors file."""

    file: Path
    key: str

    @property
    def dtype(self) -> torch.dtype:
        try:
            with safe_open(self.file, framework="pt") as file:
                return _HALVES.get(file.get_slice(self.key).get_dtype(), torch.float32)
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"cannot read {self.key} from {self.file}: {error}") from error

    def load(self, rows: slice = slice(None)) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as file:
                if rows == slice(None):
                    return file.get_tensor(self.key)
                return file.get_slice(self.key)[rows]
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"cannot read {self.key} from {self.file}: {error}") from error


Change = Callable[[Tensor], Tensor]
"""A parameter as its file has it, float32 → the parameter that the network has, float32."""


class MappedWeights:
    """Parameters in files.

    Args:
        places: parameter name → where it is.
        changes: parameter name → what is done to it when it is read; nothing to the others.
    """

    def __init__(
        self, places: Mapping[str, Place], changes: Mapping[str, Change] | None = None
    ) -> None:
        self._places, self._changes = dict(places), dict(changes or {})

    def read(self, name: str) -> Tensor:
        """One parameter, float32.

        Raises:
            PolicyError: the file cannot be read any more.
            NonFiniteError: the parameter has NaN or Inf.
        """
        place = self._places[name]
        found = read_place(place)
        if name not in self._changes:
            return found
        changed = self._changes[name](found)
        _require_finite(changed, place, "has NaN or Inf after the adapter was folded into it")
        return changed

    def dtype(self, name: str) -> torch.dtype:
        """A type that holds one parameter as it is, told by the file's header.

        Raises:
            PolicyError: the file cannot be read any more.
        """
        return torch.float32 if name in self._changes else self._places[name].dtype


def read_place(place: Place) -> Tensor:
    """One tensor of a file, float32, owned by the caller.

    Raises:
        PolicyError: the file cannot be read any more.
        NonFiniteError: the tensor has NaN or Inf.
    """
    # Contiguous whatever its file has: an adapter is folded in by a view of it.
    found = place.load().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _require_finite(found, place, "has NaN or Inf: it is damaged")
    return found


def _require_finite(tensor: Tensor, place: Place, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{place.key} of {place.file} {what}")


class SeededWeights:
    """Normal random parameters of given shapes, rounded to bfloat16 as checkpoints are stored.

    Every tensor has a generator of its own, seeded by ``seed`` and its name, so that its values do
    not depend on which tensors were read before.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], seed: int) -> None:
        self._shapes, self._seed = dict(shapes), seed

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
        drawn = torch.empty(tuple(shape)).normal_(0.0, spread, generator=generator)
        return drawn.to(torch.bfloat16).to(torch.float32)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16


@contextmanager
def weights_on(
    module: nn.Module,
    store: WeightStore | None,
    paths: Iterable[str],
    device: torch.device | None = None,
) -> Iterator[None]:
    """Give what is below ``paths`` its values, on a device, for as long as the block runs.

    Args:
        module: the network.
        store: where parameters without values get them; None leaves those without.
        paths: of the modules that will be computed with.
        device: where their parameters and buffers are to be.  None leaves those that have values
            where they are, and puts the others on the CPU.

    Afterwards every module has the very tensors it had before.
    """
    given: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for owner, kind, name in _tensors(module, paths):
            tensor = getattr(owner, kind)
            if tensor.is_meta and store is not None:
                value = store.read(name)
            elif tensor.is_meta or device is None or tensor.device == device:
                continue
            else:
                value = tensor.detach()
            if device is not None:
                value = value.to(device)
            given.append((owner, kind, tensor))
            parameter = isinstance(tensor, nn.Parameter)
            setattr(owner, kind, nn.Parameter(value, requires_grad=False) if parameter else value)
        yield
    finally:
        for owner, kind, tensor in given:
            setattr(owner, kind, tensor)


def materialize(module: nn.Module, store: WeightStore) -> None:
    """Give all parameters that have no values theirs, for good."""
    for owner, kind, name in _tensors(module, [""]):
        if getattr(owner, kind).is_meta:
            setattr(owner, kind, nn.Parameter(store.read(name), requires_grad=False))


def named_values(module: nn.Module, store: WeightStore | None) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers in order of name, one at a time in memory where a store has them.

    Raises:
        PolicyError: a tensor has no value and there is no store.
    """
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers())):
        if not tensor.is_meta:
            yield name, tensor.detach()
        elif store is not None:
            yield name, store.read(name)
        else:
            raise PolicyError(f"{name} has no value: this policy is only a structure")


def _tensors(module: nn.Module, paths: Iterable[str]) -> list[tuple[nn.Module, str, str]]:
    """Parameters and buffers as (owner, name in the owner, full name), each once."""
    found: dict[str, tuple[nn.Module, str, str]] = {}
    for path in paths:
        for prefix, owner in module.get_submodule(path).named_modules(prefix=path):
            own = (owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
            for kind, _ in chain(*own):
                name = f"{prefix}.{kind}" if prefix else kind
                found[name] = (owner, kind, name)
    return list(found.values())
