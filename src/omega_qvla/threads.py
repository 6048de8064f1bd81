"""How many threads compute.

Two kinds of threads are at work on a processor: the kernels' own (``csrc/pool.cpp``), whose idle
ones sleep after 20 µs, and those of PyTorch (``openmp.py``).  What is too small to share is
computed on one: the layers of a small policy take some microseconds each, waking a thread takes
longer, and beside other programs every wait for a second thread may cost a time slice.  What one
thread computes also has the same bits however many there are.

PyTorch counts threads per calling thread.  A number chosen here holds inside a block, for the
thread that enters it, and the user's own comes back at its end.  A thread that calls PyTorch for
the first time while another is inside a block starts with that block's number: PyTorch keeps one
number for newcomers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from omega_qvla.errors import ResourceError

WORTH_SHARING = 1 << 20
"""Weights of the widest linear from which on more than one thread is used.  At 50 rows its product
takes about a millisecond of one core, twenty times what waking a thread does."""


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int) -> int:
    """The number of threads, if that many make sense here.

    Raises:
        ResourceError: fewer than one, or more than there are cores.
    """
    cores = available_cores()
    if not 1 <= threads <= cores:
        raise ResourceError(f"threads={threads}: this process may use 1 to {cores} cores")
    return threads


def usable_threads(threads: int | None) -> int:
    """Threads of a call; None follows ``torch.get_num_threads()``, up to the cores there are."""
    wanted = torch.get_num_threads() if threads is None else threads
    return wanted if wanted == 1 else min(wanted, available_cores())


def fitting_threads(widest: int, threads: int | None = None) -> int:
    """Threads that a network is worth whose largest linear has ``widest`` weights.

    One below ``WORTH_SHARING``, else what ``usable_threads(threads)`` gives.
    """
    return usable_threads(threads) if widest >= WORTH_SHARING else 1


def widest_linear(module: nn.Module) -> int:
    """Weights of the largest linear in a module, quantized ones included; 0 without any."""
    return max(
        (
            int(getattr(child, "in_features", 0)) * int(getattr(child, "out_features", 0))
            for child in module.modules()
        ),
        default=0,
    )


def chosen_threads(module: nn.Module, threads: int | None) -> int:
    """Threads of a network: as many as asked for; None: what it is worth, up to every core.

    Raises:
        ResourceError: more than there are cores.
    """
    return fitting_threads(widest_linear(module)) if threads is None else check_threads(threads)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with ``count`` threads inside the block, for the thread that entered it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
