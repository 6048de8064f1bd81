"""What a loaded policy computes between its linears: one launch each on a GPU, one pass on a CPU.

Either takes the place of ``policies.elementwise.TORCH`` when an artifact is loaded.  On a GPU four
launches of an adaptive norm become one; a gate, its activation and its product become the end of
the multiplication that made them, where the two linears are one fused module of integers, and one
launch elsewhere; a rotation is one launch; a gated residual, a plain norm and an activation alone
are one operation of PyTorch's.  On a processor norms, activations with their product, and rotations
are one pass over memory each; residuals stay PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omega_qvla.policies.layers.elementwise import RMS_EPS, Elementwise, Gate, RotaryTable
from omega_qvla.runtime.kernels import cpu, cpu_elementwise
from omega_qvla.runtime.kernels.triton_elementwise import gated_product, normalize, rotate
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.threads import usable_threads


class FusedElementwise(Elementwise):
    """By the GPU programs; see ``Elementwise`` for what each computes."""

    def rms_norm(self, x: Tensor, gain: Tensor, base: float) -> Tensor:
        return normalize(x, gain, None, base=base, eps=RMS_EPS, centred=False)

    def adaptive_rms_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return normalize(x, scale, shift, eps=RMS_EPS, centred=False)

    def adaptive_layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        return normalize(x, scale, shift, eps=eps, centred=True)

    def add_gated(self, stream: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(stream, gate, branch)

    def gated_product(self, kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
        return gated_product(kind, gate, up)

    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        return super().rotate(x, table) if x.ndim != 4 else rotate(x, *table)

    def gated_linears(
        self, kind: Gate, x: Tensor, gate_proj: nn.Module, up_proj: nn.Module | None
    ) -> Tensor:
        if up_proj is None and isinstance(gate_proj, QuantizedLinear) and gate_proj.can_gate():
            return gate_proj.gated(x, kind)
        return super().gated_linears(kind, x, gate_proj, up_proj)


class CpuElementwise(Elementwise):
    """By the C++ kernels, for float32 on the CPU.

    Other tensors, and a policy that ``torch.compile`` traces, are computed as defined.

    Args:
        path: name of the instruction set.
        threads: as for linears; None follows ``torch.get_num_threads()``.

    Raises:
        ResourceError: no C++ kernels, or a path this processor cannot run.
    """

    def __init__(self, path: str, threads: int | None = None) -> None:
        self._path, self._threads = cpu.path_number(path), threads

    def rms_norm(self, x: Tensor, gain: Tensor, base: float) -> Tensor:
        if not _can(x, gain):
            return super().rms_norm(x, gain, base)
        return cpu_elementwise.normalize(
            *self._run(), x, gain, base=base, eps=RMS_EPS, centred=False
        )

    def adaptive_rms_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        if not _can(x, scale, shift):
            return super().adaptive_rms_norm(x, scale, shift)
        return cpu_elementwise.normalize(*self._run(), x, scale, shift, eps=RMS_EPS, centred=False)

    def adaptive_layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        if not _can(x, scale, shift):
            return super().adaptive_layer_norm(x, scale, shift, eps)
        return cpu_elementwise.normalize(*self._run(), x, scale, shift, eps=eps, centred=True)

    def layer_norm(
        self, x: Tensor, eps: float, gain: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        if not _can(x, *(one for one in (gain, bias) if one is not None)):
            return super().layer_norm(x, eps, gain, bias)
        return cpu_elementwise.normalize(
            *self._run(), x, gain, bias, base=0.0, eps=eps, centred=True
        )

    def activate(self, kind: Gate, x: Tensor) -> Tensor:
        if not _can(x):
            return super().activate(kind, x)
        return cpu_elementwise.gate(*self._run(), kind, x)

    def gated_product(self, kind: Gate, gate: Tensor, up: Tensor) -> Tensor:
        if not _can(gate, up):
            return super().gated_product(kind, gate, up)
        return cpu_elementwise.gate(*self._run(), kind, gate, up)

    def rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        if not _can(x, *table) or x.ndim != 4:
            return super().rotate(x, table)
        return cpu_elementwise.rotate(*self._run(), x, *table)

    def _run(self) -> tuple[int, int]:
        return self._path, usable_threads(self._threads)


def _can(*tensors: Tensor) -> bool:
    """Whether the C++ kernels can read these."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return not torch.compiler.is_compiling()
