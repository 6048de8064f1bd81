"""Which GPU there is, whether the kernels run there, and how long a call takes on it.

Without Triton, without a CUDA build of PyTorch, or without a GPU of compute capability 8.0,
``find`` says which of them is missing and callers have no GPU; nothing here pretends otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import torch

from omega_qvla.devices import Gpu, find_gpu
from omega_qvla.errors import ResourceError
from omega_qvla.extras import needing
from omega_qvla.runtime.kernels.triton_tuning import Tuner

LEAST_CAPABILITY = (8, 0)
"""int8 tensor cores as used here, and asynchronous copies, begin with Ampere."""
LEAST_TRITON = (3, 6)


def find(device: str) -> Gpu:
    """The GPU behind ``cuda`` or ``cuda:N``, if the kernels run there.

    Raises:
        ResourceError: no such device, no GPU, a GPU that is too old, or Triton is missing or too
            old.
    """
    gpu = find_gpu(device)
    programs()
    return check_capability(gpu)


def check_capability(gpu: Gpu) -> Gpu:
    """The GPU, if it has the instructions the kernels are made of.

    Raises:
        ResourceError: it is older than Ampere.
    """
    if gpu.capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (gpu.capability, LEAST_CAPABILITY))
        raise ResourceError(
            f"{gpu.name} has compute capability {found}; the kernels need {least} (Ampere) or "
            "later. Use device='cpu'"
        )
    return gpu


def programs() -> ModuleType:
    """The module with the GPU programs.

    Raises:
        ResourceError: Triton is not installed, or too old.
    """
    with needing("multiplying on a GPU (PyTorch's CUDA builds bring it)", "gpu"):
        triton = importlib.import_module("triton")
    check_version(triton.__version__)
    return importlib.import_module("omega_qvla.runtime.kernels.triton_device")


def check_version(found: str) -> None:
    """Refuse a Triton that cannot compile the programs.

    Raises:
        ResourceError: it is older than the oldest that was tried.
    """
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        raise ResourceError(
            f"Triton {found} is too old, the GPU kernels need {least} or later: upgrade PyTorch, "
            "which brings its own, or pip install -U triton"
        )


def tuner(gpu: Gpu, folder: Path) -> Tuner:
    """A tuner that measures on this GPU.

    Raises:
        ResourceError: no Triton, or nothing can be written to the folder.
    """
    source = Path(str(programs().__file__)).read_bytes()
    identity = {
        "gpu": gpu.name,
        "triton": str(importlib.import_module("triton").__version__),
        "programs": hashlib.sha256(source).hexdigest()[:16],
    }
    return Tuner(folder, identity, gpu.processors, lambda call: seconds(call, gpu.device))


def seconds(call: Callable[[], object], device: str, rounds: int = 15) -> float:
    """Median seconds of a call on the GPU, by CUDA events; compiled and warmed up before."""
    with torch.cuda.device(device):
        for _ in range(3):
            call()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in pairs:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return 1e-3 * median(begin.elapsed_time(end) for begin, end in pairs)
