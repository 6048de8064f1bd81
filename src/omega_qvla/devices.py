"""The device that computes: which one there is, what is refused, how exactly it computes.

A policy is quantized or run on the CPU or on an NVIDIA GPU.  Here a GPU is found by its name, or
refused with what was found and what to do.  What only the integer kernels need of one (Triton, a
compute capability) they ask for themselves: quantizing is PyTorch's own float32 and float64
arithmetic, which every GPU has that PyTorch supports.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from omega_qvla.errors import ResourceError

CPU = torch.device("cpu")

EXPERIMENTAL = (
    "GPU support is experimental: nothing of it has run on a GPU yet; docs/gpu.md says what was "
    "proven without one"
)
"""What commands say before they use a GPU."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as found.

    Attributes:
        device: its name in PyTorch, with its number.
        name: its name in the world.
        capability: compute capability, (major, minor).
        processors: multiprocessors.
        free_bytes: memory that can be had now.
    """

    device: str
    name: str
    capability: tuple[int, int]
    processors: int
    free_bytes: int

    @property
    def arithmetic(self) -> str:
        """What decides how its sums are rounded, besides PyTorch's version; not its number."""
        major, minor = self.capability
        return f"{self.name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"


def find_gpu(device: str) -> Gpu:
    """The GPU behind ``cuda`` or ``cuda:N``.

    Raises:
        ResourceError: no such device, a PyTorch without CUDA, or no GPU of that number.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ResourceError(f"device {device!r}: there are 'cpu', 'cuda' and 'cuda:N'")
    if torch.version.cuda is None:
        raise ResourceError(
            f"device {device!r}: this PyTorch ({torch.__version__}) was built without CUDA; "
            "install a CUDA build (pytorch.org), or use device='cpu'"
        )
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ResourceError(
            f"device {device!r}: PyTorch sees {count} GPUs; is the driver loaded (nvidia-smi)?"
        )
    index = int(number) if number else torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        device=f"cuda:{index}",
        name=properties.name,
        capability=(properties.major, properties.minor),
        processors=properties.multi_processor_count,
        free_bytes=torch.cuda.mem_get_info(index)[0],
    )


def check_memory(gpu: Gpu, needed: int, what: str) -> None:
    """Refuse now what would run out of memory later.

    Raises:
        ResourceError: more bytes are needed than are free.
    """
    if needed > gpu.free_bytes:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.2f} GB of GPU memory, {gpu.name} has "
            f"{gpu.free_bytes / 1e9:.2f} GB free"
        )


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products are float32 inside the block, on GPUs too.

    By default cuDNN rounds the inputs of a convolution to TF32, eleven bits, and a program may have
    asked the same of matrix products.  The switches belong to the whole process, which is why they
    are put back.
    """
    switches = _switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, exact in switches:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """Where PyTorch keeps them (elsewhere since 2.9), and what they are to be."""
    products, library = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(products, "fp32_precision"):
        name = "fp32_precision"
        return [(products, name, "ieee"), (getattr(library, "conv"), name, "ieee")]  # noqa: B009
    return [(products, "allow_tf32", False), (library, "allow_tf32", False)]


@contextmanager
def computing_on(gpu: Gpu | None, what: str) -> Iterator[torch.device]:
    """The device to compute on inside the block: the GPU, in full float32, or the CPU.

    Raises:
        ResourceError: the GPU ran out of memory while it did ``what``.
    """
    if gpu is None:
        yield CPU
        return
    try:
        with full_float32():
            yield torch.device(gpu.device)
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{what}: {gpu.name} ran out of memory; end what else runs there, or use device='cpu' "
            f"({error})"
        ) from error
