"""How PyTorch's idle threads wait: asleep, not spinning.

PyTorch computes with OpenMP, whose threads by default spin for milliseconds when they wait for
work or for each other.  On a machine where nothing else runs that saves some microseconds a call.
Beside other programs it costs their time slices, again and again: several times the time of a chunk
(docs/kernels.md).  So, where the user said nothing about it:

* Where torch is imported later, ``OMP_WAIT_POLICY`` is set for that import alone, whoever does it:
  the runtimes (GNU's libgomp, LLVM's and Intel's libomp) read it once, when they are loaded.  Then
  it is taken away again, so that child processes and other libraries never see it.  To know when
  torch is imported, Python's import system is asked: a finder of its own, first in
  ``sys.meta_path``, hands torch's loader out in a wrapping that sets the variable.
* Where torch was imported first, GNU's runtime is told by what its manual says of
  ``GOMP_SPINCOUNT``: threads spin a hundred times instead of 300,000 when there are more of them
  than processors.  So that many are started once, and sleep.

Both hold for the process, for whatever uses PyTorch in it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from threading import Event, Thread
from types import ModuleType

WAIT_POLICY = "OMP_WAIT_POLICY"
THE_USERS = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how OpenMP's threads wait; any of them is left in charge."""


def let_idle_threads_sleep() -> None:
    """Have torch's threads sleep while they wait, from now on or from its import on."""
    if any(name in os.environ for name in THE_USERS):
        return
    if "torch" in sys.modules:
        for library in _runtimes():
            _outnumber_processors(library)
    elif not any(isinstance(finder, _TorchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFinder())


class _TorchFinder(MetaPathFinder):
    """Finds torch as the other finders do, in a wrapping."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = (one for one in sys.meta_path if not isinstance(one, _TorchFinder))
        found = (one.find_spec(fullname, path, target) for one in others)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _PassiveLoader(spec.loader)
        return spec


class _PassiveLoader(Loader):
    """Loads torch with the variable set, and leaves it as if its own loader had done so alone."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        sys.meta_path[:] = [one for one in sys.meta_path if not isinstance(one, _TorchFinder)]
        if any(name in os.environ for name in THE_USERS):  # set since
            self._own.exec_module(module)
            return
        os.environ[WAIT_POLICY] = "PASSIVE"
        try:
            self._own.exec_module(module)
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
