"""How PyTorch's idle threads wait: asleep, not spinning.

PyTorch computes with OpenMP, whose threads by default spin for milliseconds when they wait for
work or for each other.  On a machine where nothing else runs that saves some microseconds a call.
Beside other programs it costs their time slices, again and again: several times the time of a chunk
(docs/kernels.md).  So, where the user said nothing about it:

* Before torch is imported, ``OMP_WAIT_POLICY`` is set for that import alone: the runtimes (GNU's
  libgomp, LLVM's and Intel's libomp) read it once, when they are loaded.  Then it is taken away
  again, so that child processes and other libraries never see it.
* Where torch was imported first, GNU's runtime is told by what its manual says of
  ``GOMP_SPINCOUNT``: threads spin a hundred times instead of 300,000 when there are more of them
  than processors.  So that many are started once, and sleep.

Both hold for the process, for whatever uses PyTorch in it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from threading import Event, Thread

WAIT_POLICY = "OMP_WAIT_POLICY"
THE_USERS = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how OpenMP's threads wait; any of them is left in charge."""


def let_idle_threads_sleep() -> None:
    """Import torch so that its threads sleep while they wait, or have them do so from now on."""
    if any(name in os.environ for name in THE_USERS):
        return
    if "torch" in sys.modules:
        for library in _runtimes():
            _outnumber_processors(library)
        return
    os.environ[WAIT_POLICY] = "PASSIVE"
    try:
        import torch  # noqa: F401 # pyright: ignore[reportUnusedImport]
    finally:
        del os.environ[WAIT_POLICY]


def _runtimes() -> list[str]:
    """Paths of GNU's OpenMP runtime in this process; torch's own where it brings one."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:  # not Linux
        return []
    paths = [line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line]
    found = [path for path in dict.fromkeys(paths) if Path(path).exists()]
    return [path for path in found if "/torch" in path] or found


def _outnumber_processors(library: str) -> None:
    """Start one thread more than this process has processors, for as long as it lives."""
    parallel = getattr(ctypes.CDLL(library), "GOMP_parallel", None)
    if parallel is None:
        return
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    # What all of them do once before they sleep: free(NULL), which is nothing.
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
    started = Event()

    def hold() -> None:
        parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
        started.set()
        Event().wait()  # they end with the thread that started them

    Thread(target=hold, name="openmp", daemon=True).start()
    started.wait()
