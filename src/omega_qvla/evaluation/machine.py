"""What works on this machine: everything is tried, nothing is assumed from a version number."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import torch

from omega_qvla.devices import EXPERIMENTAL, find_gpu
from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.extras import extras, installation
from omega_qvla.flow_time import FlowClock
from omega_qvla.openmp import THE_USERS
from omega_qvla.policies.full_precision import available_memory
from omega_qvla.recipe import ActivationScheme
from omega_qvla.results.summaries import Check
from omega_qvla.runtime.kernels import cpu
from omega_qvla.runtime.linear import REFERENCE, QuantizedLinear
from omega_qvla.threads import available_cores

SIMULATOR_S = 180
"""After so many seconds a simulator that draws nothing counts as broken."""
_APART = {"libero": "in an environment of its own (docs/libero.md), "}
"""Extras whose versions do not go with the others'."""
_DRAWS = (
    "from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv;"
    "MetaWorldEnv({task!r}).reset(seed=0)"
)


def examine_machine(disk: Path, progress: Callable[[int, int], None]) -> list[Check]:
    """Everything that a command may need, tried.

    Args:
        disk: where artifacts will go.
        progress: called with (checks done, all).
    """
    known, owners = extras(), packages_distributions()
    checks: list[Callable[[], Check]] = [
        _versions,
        _kernels,
        _threads,
        lambda: Check(
            name="memory", state="ok", found=f"{available_memory() / 1e9:.1f} GB can be had"
        ),
        lambda: _disk(disk),
        _gpu,
        *(partial(_extra, name, known[name], owners) for name in known),
        *((_simulator,) if "sim" in known else ()),
    ]
    found: list[Check] = []
    for number, check in enumerate(checks):
        progress(number, len(checks))
        found.append(check())
    progress(len(checks), len(checks))
    return found


def _versions() -> Check:
    parts = f"omega-qvla {version('omega-qvla')}, Python {platform.python_version()}"
    words = f"{parts}, PyTorch {torch.__version__}, numpy {version('numpy')}"
    return Check(name="versions", state="ok", found=words)


def _kernels() -> Check:
    """The kernels give the reference's integers, on a small layer."""
    sets = cpu.instruction_sets()
    if not sets:
        words = "only the reference kernel: the C++ extension is not built for this machine; slow"
        return Check(name="kernels", state="absent", found=words)
    wrong = [name for name in sets if not _agrees(name)]
    if wrong:
        words = f"{', '.join(wrong)}: other results than the reference kernel; do not use it"
        return Check(name="kernels", state="broken", found=words)
    return Check(name="kernels", state="ok", found=f"{cpu.instruction_set()} of {', '.join(sets)}")


def _agrees(kernel: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 48, 128
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    words = torch.randint(low, high, (rows, columns // 8), generator=generator).to(torch.int32)
    x = torch.randn(5, columns, generator=generator)
    tensors = {"weight_scale": torch.ones(rows), "weight_shape": torch.tensor([rows, columns])}

    def product(name: str) -> torch.Tensor:
        linear = QuantizedLinear.from_tensors(
            {
                **tensors,
                "weight_packed": words.clone(),
            },
            activations=ActivationScheme(),
            group=None,
            splits=(rows,),
            clock=FlowClock(),
            kernel=name,
        )
        linear.prepare()
        return linear(x)

    return torch.allclose(product(kernel), product(REFERENCE), rtol=1e-5, atol=1e-4)


def _threads() -> Check:
    words = f"{available_cores()} cores, PyTorch computes with {torch.get_num_threads()}"
    told = [f"{name}={os.environ[name]}" for name in THE_USERS if name in os.environ]
    waiting = ", ".join(told) or "idle threads sleep"
    return Check(name="threads", state="ok", found=f"{words}; {waiting}")


def _disk(place: Path) -> Check:
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check(name="disk", state="broken", found=f"{place}: {error.strerror}")
    writable = os.access(place, os.W_OK)
    words = f"{free / 1e9:.1f} GB free in {place.resolve()}"
    if not writable:
        return Check(name="disk", state="broken", found=f"{words}, which cannot be written to")
    return Check(name="disk", state="ok", found=words)


def _gpu() -> Check:
    try:
        gpu = find_gpu("cuda")
    except ResourceError as error:
        return Check(name="GPU", state="absent", found=str(error))
    memory = f"{gpu.free_bytes / 1e9:.1f} GB free"
    return Check(name="GPU", state="ok", found=f"{gpu.name}, {memory}; {EXPERIMENTAL}")


def _extra(name: str, requirements: list[str], owners: Mapping[str, list[str]]) -> Check:
    """The packages of an extra, imported.

    Args:
        owners: module → the distributions it comes from.
    """
    what = f"extra {name}"
    found: list[str] = []
    missing: list[str] = []
    for requirement in requirements:
        package = "".join(_leading(requirement))
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        where = _APART.get(name, "")
        words = f"without {', '.join(missing)}: {where}{installation(name)}"
        return Check(name=what, state="absent", found=words)
    try:
        for requirement in requirements:
            for module in _modules("".join(_leading(requirement)), owners):
                import_module(module)
    except Exception as error:  # whatever a package does wrong while it is imported
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        words = f"cannot be imported: {first}; install versions that fit each other"
        return Check(name=what, state="broken", found=f"{', '.join(found)} {words}")
    return Check(name=what, state="ok", found=", ".join(found))


def _leading(requirement: str) -> Iterator[str]:
    """The name that a requirement begins with."""
    for letter in requirement:
        if not (letter.isalnum() or letter in "-_."):
            return
        yield letter


def _modules(distribution: str, owners: Mapping[str, list[str]]) -> list[str]:
    """What a distribution is imported as; its private helpers left out."""
    plain = distribution.lower().replace("_", "-")
    return [
        module
        for module, names in owners.items()
        if plain in (name.lower().replace("_", "-") for name in names)
        and module.isidentifier()
        and not module.startswith("_")
    ]


def _simulator() -> Check:
    """Meta-World draws a picture in a process of its own."""
    try:
        import_module("metaworld")
    except ImportError:
        words = f"not installed: {installation('sim')}"
        return Check(name="simulator", state="absent", found=words)
    except Exception as error:  # its own faults, told below by the process
        words = f"{type(error).__name__}: {error}"
        return Check(name="simulator", state="broken", found=words)
    program = _DRAWS.format(task=next(iter(TASKS)))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            timeout=SIMULATOR_S,
        )
    except subprocess.TimeoutExpired:
        words = f"Meta-World drew no picture in {SIMULATOR_S} s"
        return Check(name="simulator", state="broken", found=words)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        return Check(name="simulator", state="broken", found=f"Meta-World draws no picture: {last}")
    return Check(name="simulator", state="ok", found="Meta-World draws pictures")
