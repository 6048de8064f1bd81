"""A GPU that is not there: tensors that say ``cuda:0`` and refuse to meet those of the CPU.

On a machine without a GPU nothing fails when a tensor was forgotten on the CPU, because everything
is there.  Here a tensor "on the GPU" is a wrapper around a CPU tensor that does the computing, so
that values are real and code that depends on them runs as it would.  Every operation that PyTorch
dispatches is looked at: one that has a wrapped tensor and a bare one, and not as a scalar of no
dimensions, raises ``MixedDevicesError``, as CUDA would.  Tensors come to the other side only where
the code says so: ``.to``, ``.cpu``, or a factory's ``device=``.

Stricter than CUDA: it also refuses bare index tensors and ``copy_`` across devices, which CUDA
takes (and waits for).  What it cannot show: that CUDA has an operation, how it rounds, and what an
operation needs of memory beside its result.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from omega_qvla import devices
from omega_qvla.devices import Gpu

DEVICE = torch.device("cuda", 0)
GPU = Gpu(str(DEVICE), "NVIDIA Stand-in", (7, 5), 46, 1 << 40)


class MixedDevicesError(RuntimeError):
    """One operation has tensors of both devices."""


class Memory:
    """Bytes behind all wrapped tensors that are alive, views counted once, and the most so far."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._owners: dict[int, int] = {}

    def take(self, wrapper: OnGpu) -> None:
        storage = wrapper.behind.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self._owners[place] = self._owners.get(place, 0) + 1
        if self._owners[place] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(wrapper, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._owners[place] -= 1
        if not self._owners[place]:
            del self._owners[place]
            self.held -= size


class OnGpu(torch.Tensor):
    """A tensor on the stand-in: what PyTorch sees of it, and the CPU tensor behind it."""

    behind: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, behind: torch.Tensor, memory: Memory) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            behind.shape,
            strides=behind.stride(),
            storage_offset=behind.storage_offset(),
            dtype=behind.dtype,
            device=behind.device,  # for C++, which would look for a driver
        )
        made.behind, made.memory = behind, memory
        memory.take(made)
        return made

    device = DEVICE  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    is_cpu = False  # type: ignore[assignment]

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.behind!r})"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")

    def tolist(self) -> Any:
        return self.behind.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        flat, structure = tree_flatten((args, kwargs or {}))
        tensors = [item for item in flat if isinstance(item, torch.Tensor)]
        wrapped = [item for item in tensors if isinstance(item, OnGpu)]
        bare = [item for item in tensors if not isinstance(item, OnGpu) and item.ndim > 0]
        if bare:
            shapes = ", ".join(str(list(item.shape)) for item in bare)
            raise MixedDevicesError(f"{func}: {shapes} on the CPU, others on {DEVICE}")
        known = {id(item.behind): item for item in wrapped}
        inner = [item.behind if isinstance(item, OnGpu) else item for item in flat]
        inner_args, inner_kwargs = tree_unflatten(inner, structure)
        result = func(*inner_args, **inner_kwargs)

        def wrap(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            return known[id(item)] if id(item) in known else OnGpu(item, wrapped[0].memory)

        outputs, form = tree_flatten(result)
        return tree_unflatten([wrap(item) for item in outputs], form)


class StandIn(TorchFunctionMode):
    """Inside this mode ``cuda:0`` exists, with a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # PyTorch refuses views of wrappers in inference mode; without gradients it is the same.
        with torch.inference_mode(False), torch.no_grad():
            return self._call(func, args, dict(kwargs or {}))

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return self._to(args[0], torch.device("cpu"))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            made = func(*args, device="cpu" if device == DEVICE else device, **kwargs)
            return OnGpu(made, self.memory) if device == DEVICE else made
        return func(*args, **kwargs)

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rest = list(args)
        device = kwargs.pop("device", None)
        if rest and isinstance(rest[0], torch.Tensor):
            other = rest.pop(0)
            device, kwargs["dtype"] = other.device, other.dtype
        elif rest and isinstance(rest[0], (str, torch.device)):
            device = rest.pop(0)
        target = tensor.device if device is None else torch.device(device)
        if target == tensor.device:
            place = "cpu" if target == DEVICE else target  # as C++ knows it
            return torch.Tensor.to(tensor, place, *rest, **kwargs)
        if isinstance(tensor, OnGpu):
            return torch.Tensor.to(tensor.behind.clone(), target, *rest, **kwargs)
        if target != DEVICE:
            return torch.Tensor.to(tensor, target, *rest, **kwargs)
        arrived = torch.Tensor.to(tensor.detach().clone(), "cpu", *rest, **kwargs)
        return OnGpu(arrived, self.memory)


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every file of an artifact, by its name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def precision() -> list[Any]:
    """How PyTorch rounds products on a GPU now."""
    return [getattr(owner, name) for owner, name, _ in devices._switches()]
