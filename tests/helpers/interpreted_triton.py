"""The GPU kernels under Triton's interpreter, in a process of its own.

Whether a kernel is interpreted is decided by an environment variable when Triton is imported.  The
variable is set while the process starts and gone before any test runs, and no other test's Triton
is touched.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_checks
import numpy as np
import pytest
import torch
from torch import Tensor

from omega_qvla.policies.layers.elementwise import Gate, use_elementwise
from omega_qvla.runtime.fused import FusedElementwise
from omega_qvla.runtime.kernels import triton as gpu
from omega_qvla.runtime.kernels import triton_elementwise
from omega_qvla.runtime.kernels.triton_layout import spread_offset
from omega_qvla.runtime.kernels.triton_tuning import Tiling
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.runtime.load import load
from omega_qvla.runtime.schedule import Schedule


@dataclass(frozen=True)
class Call:
    """One layer and one call on it; arrays, so that nothing but bytes passes between processes."""

    operands: dict[str, Any]
    x: np.ndarray
    static_scale: float | None = None
    dtype: str = "float32"
    tilings: tuple[Tiling, ...] = ()
    offset: np.ndarray | None = None
    bias: np.ndarray | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Step:
    """One operation between two linears, by its name in ``triton_elementwise``, and its arguments;
    ``slices`` cuts those of its arrays that are parts of something larger."""

    name: str
    arguments: dict[str, Any]
    slices: dict[str, tuple[slice, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """A check of ``gpu_checks``, by its name; ``spoil`` names a program that is off by 1 %."""

    name: str
    trials: int
    spoil: str | None = None


@dataclass
class Answer:
    """What the kernels gave: integers [M, width], output [M, N] and one output per tiling."""

    integers: np.ndarray
    output: np.ndarray
    tiled: list[np.ndarray] = field(default_factory=list)


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    found = torch.from_numpy(value)
    return found.bfloat16() if name == "transform" else found


@dataclass(frozen=True)
class Chunk:
    """One action chunk of an artifact whose every linear is given the GPU kernel."""

    artifact: Path
    observation: dict[str, Any]
    noise: np.ndarray


def chunk(call: Chunk) -> np.ndarray:
    """Sample one chunk here, with the module's own code around the interpreted kernels."""
    policy = load(call.artifact, kernel="reference").policy
    use_elementwise(policy.module, FusedElementwise())
    for linear in policy.module.modules():
        if isinstance(linear, QuantizedLinear):
            linear.kernel = gpu.NAME  # no way for users: here no tensor is on a GPU
            linear._schedule = Schedule(linear.activation_step_times, linear._step_table())
    return policy.sample_normalized(call.observation, call.noise).numpy()  # type: ignore[attr-defined]


def step(call: Step) -> np.ndarray:
    """One operation here."""
    given = {
        name: torch.from_numpy(value)[call.slices.get(name, ...)]
        if isinstance(value, np.ndarray)
        else value
        for name, value in call.arguments.items()
    }
    return getattr(triton_elementwise, call.name)(**given).numpy()


def check(call: Check) -> dict[str, int]:
    """One check here, of the interpreted programs."""
    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if call.spoil is not None:
            right = getattr(gpu_checks, call.spoil)
            patch.setattr(gpu_checks, call.spoil, lambda *a, **k: 1.01 * right(*a, **k))
        return getattr(gpu_checks, call.name)("cpu", generator, call.trials)


def answer(call: Call | Chunk | Step | Check) -> Answer | np.ndarray | dict[str, int]:
    """Run one call here."""
    if isinstance(call, Check):
        return check(call)
    if isinstance(call, Chunk):
        return chunk(call)
    if isinstance(call, Step):
        return step(call)
    operands = {name: _tensor(name, value) for name, value in call.operands.items()}
    layer = gpu.PackedLinear(operands.pop("words"), operands.pop("weight_scale"), **operands)
    x = torch.from_numpy(call.x).to(getattr(torch, call.dtype))
    scale = None if call.static_scale is None else torch.tensor(call.static_scale)
    offset = None if call.offset is None else spread_offset(torch.from_numpy(call.offset))
    bias = None if call.bias is None else torch.from_numpy(call.bias)
    integers, scales = layer.quantize(x, scale, offset)
    epilogue = gpu.Epilogue(layer.bias if bias is None else bias, call.gate)
    if call.gate is None:
        output = layer(x, scale, offset=offset, bias=bias)
    else:
        output = layer.gated(x, call.gate, scale, offset=offset, bias=bias)
    found = Answer(integers.numpy(), output.float().numpy())
    for tiling in call.tilings:
        out = torch.empty(output.shape)
        layer.multiply(integers, scales, out, epilogue, tiling)
        found.tiled.append(out.numpy())
    return found


def _serve(connection: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            connection.send(answer(connection.recv()))
        except EOFError:
            return
        except Exception as error:  # it is the test that must fail, not this process
            connection.send(f"{type(error).__name__}: {error}")


class Interpreter:
    """Asks the other process."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def __call__(self, call: Call) -> Answer:
        found = self._ask(call)
        assert isinstance(found, Answer), found
        return found

    def array(self, call: Chunk | Step) -> np.ndarray:
        found = self._ask(call)
        assert isinstance(found, np.ndarray), found
        return found

    def check(self, call: Check) -> dict[str, int] | str:
        """What a check counts, or how it fails."""
        return self._ask(call)

    def _ask(self, call: Call | Chunk | Step | Check) -> Any:
        self._connection.send(call)
        assert self._connection.poll(200), "the interpreter hangs"
        return self._connection.recv()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    """Start the process, and end it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()
    try:
        yield Interpreter(ours)
    finally:
        process.terminate()
        process.join()


def numpy_operands(**operands: Tensor | int | None) -> dict[str, Any]:
    """Operands of ``PackedLinear`` as a ``Call`` carries them."""
    return {
        name: value.float().numpy()
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16
        else value.numpy()
        if isinstance(value, Tensor)
        else value
        for name, value in operands.items()
    }
