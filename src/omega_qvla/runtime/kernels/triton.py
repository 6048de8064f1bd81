"""The GPU kernels: NVIDIA tensor cores multiply int8, weights stay in 4 bits.

``triton_device.py`` has the programs and their layouts, ``triton_tuning.py`` how products are cut.
This module adds what a tensor knows and a program does not: dtypes, shapes, devices, how many
programs to start.  A call is two to four launches: quantize (preceded by row maxima where the scale
is dynamic), multiply (followed by a sum where K was cut).  Nothing waits for the GPU, nothing is
read back, and a static scale is read from the device, so a captured graph may hold the calls.

Without Triton, without a CUDA build of PyTorch, or without a GPU of compute capability 8.0,
``find`` says which of them is missing and callers have no GPU; nothing here pretends otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor

from omega_qvla.devices import Gpu, find_gpu
from omega_qvla.errors import ObservationError, PolicyError, ResourceError
from omega_qvla.policies.elementwise import Gate
from omega_qvla.runtime.kernels.triton_tuning import SPLIT_ROWS, Tiling, Tuner, first_guess

NAME = "triton"
BLOCK = 64
"""Inputs per transform block, and per weight scale where there are groups."""
LEAST_CAPABILITY = (8, 0)
"""int8 tensor cores as used here, and asynchronous copies, begin with Ampere."""
LEAST_TRITON = (3, 6)
_PACKED = 2 * BLOCK
_ROWS_AT_ONCE = 1024
"""Rows of weight that are converted at a time: what the conversion needs beside its result."""
_MAXIMA_PARTS = 8
_MOST_COLUMNS = 1 << 17
"""16 · 128 · 8 · K must stay below 2³¹."""
_MOST_ELEMENTS = 1 << 31
"""The programs count elements in int32."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Residual:
    """What a product is added to: stream + gain · y.

    Attributes:
        stream: [M, N], contiguous, of the input's dtype.
        gain: float32 [N], or None for 1 (adaptive norms have a gate per channel and step).
    """

    stream: Tensor
    gain: Tensor | None = None


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product after its scales, while it is still in registers.

    Attributes:
        bias: float32 [N], or None.
        residual: what the output is added to, or None.
        gate: let the second half of the outputs pass through the first; without a residual.
    """

    bias: Tensor | None = None
    residual: Residual | None = None
    gate: Gate | None = None

    def residual_parts(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and stream as the programs take them."""
        return (None, None) if self.residual is None else (self.residual.gain, self.residual.stream)


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
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        raise ResourceError(
            "the GPU kernels need Triton: pip install 'omega-qvla[gpu]' (PyTorch's CUDA builds "
            "bring it)"
        ) from error
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


def supports(
    group: int | None, weight_bits: int, activation_bits: int, block: int | None, permuted: bool
) -> str | None:
    """What stands in the way of multiplying such a layer here; None if nothing does.

    Args:
        group: input channels per weight scale, or None.
        block: side of the transform's blocks, or None without a transform.
        permuted: whether the transform reads its inputs in another order.
    """
    if weight_bits != 4:
        return f"its weights have {weight_bits} bits, not 4"
    if activation_bits not in (4, 8):
        return f"its activations have {activation_bits} bits, neither 4 nor 8"
    if group not in (None, BLOCK):
        return f"it has one weight scale per {group} inputs; the kernel knows {BLOCK}, or none"
    if block not in (None, BLOCK):
        return f"its transform has blocks of {block}; the kernel knows {BLOCK}"
    if permuted:
        return "its transform permutes the inputs"
    return None


def pack(words: Tensor, columns: int) -> Tensor:
    """Row-major words int32 [N, ⌈K/8⌉] → the kernels' bytes, int8 [N, width/2], on one device.

    The integers exist one to a byte only for some rows at a time.
    """
    width = padded_width(columns)
    out = torch.empty((words.shape[0], width // 2), dtype=torch.int8, device=words.device)
    for part, target in zip(words.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        octets = part.contiguous().view(torch.uint8)
        nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)[:, :columns] ^ 8
        nibbles = torch.nn.functional.pad(nibbles, (0, width - columns))
        low, high = nibbles.view(len(part), -1, 2, BLOCK).unbind(2)
        target.copy_((low | (high << 4)).flatten(1).view(torch.int8))
    return out


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack``; fillers past the last word's values are zero bits again."""
    words = torch.empty(
        (packed.shape[0], -(-columns // 8)), dtype=torch.int32, device=packed.device
    )
    for part, target in zip(packed.split(_ROWS_AT_ONCE), words.split(_ROWS_AT_ONCE), strict=True):
        octets = part.view(torch.uint8).view(len(part), -1, BLOCK)
        nibbles = torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)[:, :columns] ^ 8
        nibbles = torch.nn.functional.pad(nibbles, (0, -columns % 8))
        target.copy_((nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int32))
    return words


def spread_offset(offset: Tensor) -> Tensor:
    """Offsets [..., K'] as the kernels read them: filled up with zeros to whole pairs of blocks."""
    missing = padded_width(offset.shape[-1]) - offset.shape[-1]
    return torch.nn.functional.pad(offset, (0, missing)).contiguous()


def padded_width(columns: int) -> int:
    """Inputs per row of packed weight: whole pairs of blocks."""
    return -(-columns // _PACKED) * _PACKED


class PackedLinear:
    """One layer's operands in the kernels' layout, and the call on them.

    Args:
        words: int32 [N, ⌈K'/8⌉] row-major nibbles (``artifact.packing``); K' is K, filled up to
            whole blocks where there is a transform.
        weight_scale: float32 [N], or [N, ⌈K'/64⌉].
        columns: K, the width of the rows the call is given.
        group: 64 inputs per weight scale, or None.
        transform: bfloat16 [⌈K/64⌉, 64, 64], or None.
        bias: float32 [N], or None.
        activation_bits: 4 or 8.
        activation_clip: share of a row's largest magnitude that a dynamic scale reaches to.
        processors: multiprocessors of the GPU, for the first guess at a tiling.
        tuner: measures tilings; None keeps to the first guess.

    Raises:
        ResourceError: no Triton.
        PolicyError: operands of another dtype, device or shape, or a layer these kernels cannot do.
    """

    def __init__(
        self,
        words: Tensor,
        weight_scale: Tensor,
        *,
        columns: int,
        group: int | None = None,
        transform: Tensor | None = None,
        bias: Tensor | None = None,
        activation_bits: int = 4,
        activation_clip: float = 1.0,
        processors: int = 1,
        tuner: Tuner | None = None,
    ) -> None:
        self._programs = programs()
        obstacle = supports(group, 4, activation_bits, None, False)
        if obstacle is not None or columns >= _MOST_COLUMNS:
            raise PolicyError(
                f"no GPU kernel for a layer of {columns} inputs: "
                f"{obstacle or f'the sums of {_MOST_COLUMNS} or more may overflow'}"
            )
        self.out_features, self.columns, self.group = words.shape[0], columns, group
        self.activation_bits, self.activation_clip = activation_bits, activation_clip
        self._processors, self._tuner = processors, tuner
        self.blocks = -(-columns // BLOCK)
        self.width = columns if transform is None else self.blocks * BLOCK
        self.device = words.device
        self._check("weight", words, torch.int32, (self.out_features, -(-self.width // 8)))
        groups = -(-self.width // BLOCK)
        scales = (self.out_features,) if group is None else (self.out_features, groups)
        self._check("weight_scale", weight_scale, torch.float32, scales)
        if transform is not None:
            self._check("transform", transform, torch.bfloat16, (self.blocks, BLOCK, BLOCK))
        if bias is not None:
            self._check("bias", bias, torch.float32, (self.out_features,))
        if self.out_features * padded_width(self.width) // 2 >= _MOST_ELEMENTS:
            raise PolicyError(
                f"a weight of {self.out_features} × {columns} is more than GPU kernels can count"
            )
        self.weight = pack(words, self.width)
        self.weight_scale = weight_scale if group is None else weight_scale.t().contiguous()
        self.transform, self.bias = transform, bias

    def words(self) -> Tensor:
        """The weight as row-major words again, int32 [N, ⌈K'/8⌉]."""
        return unpack(self.weight, self.width)

    def __call__(
        self,
        x: Tensor,
        static_scale: Tensor | None = None,
        residual: Residual | None = None,
        *,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x [M, K] → [M, N] of the same dtype.

        Args:
            x: float32, bfloat16 or float16, rows contiguous (any distance apart).
            static_scale: float32, one number, on the device; None for one dynamic scale per row.
            residual: what the output is added to while it is written.  In float32 that gives
                exactly ``stream + gain * layer(x)``; in 16 bits the sum is rounded once, not
                thrice.
            offset: float32, filled up by ``spread_offset``; subtracted from the transformed rows
                before they are rounded.
            bias: float32 [N], in place of the layer's own.

        Raises:
            ObservationError: x has another dtype, device, shape or stride, or the residual has.
        """
        self._check_input(x)
        if residual is not None:
            self._check_residual(x, residual)
        epilogue = Epilogue(self.bias if bias is None else bias, residual)
        return self._compute(x, self.out_features, static_scale, offset, epilogue)

    def gated(
        self,
        x: Tensor,
        kind: Gate,
        static_scale: Tensor | None = None,
        *,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x [M, K] → [M, N/2]: activation(y) · y', the two halves of what a call would give.

        Neither half is written: two sums of one program are scaled and multiplied.  Arguments are
        those of a call.

        Raises:
            ObservationError: see ``__call__``.
            PolicyError: an odd number of outputs, or one weight scale per group.
        """
        if self.out_features % 2 or self.group is not None:
            raise PolicyError(
                f"a gated product needs two halves and one weight scale per output; this layer has "
                f"{self.out_features} outputs, group {self.group}"
            )
        self._check_input(x)
        epilogue = Epilogue(self.bias if bias is None else bias, gate=kind)
        return self._compute(x, self.out_features // 2, static_scale, offset, epilogue)

    def _compute(
        self,
        x: Tensor,
        outputs: int,
        static_scale: Tensor | None,
        offset: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        """Checked rows [M, K] → [M, outputs] of the same dtype."""
        out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
        if not x.shape[0]:
            return out
        with torch.cuda.device_of(x):  # Triton starts programs on the current device
            integers, scales = self.quantize(x, static_scale, offset)
            if self.group is None:
                self.multiply(integers, scales, out, epilogue)
            else:
                self._multiply_grouped(integers, scales, out, epilogue)
        return out

    def quantize(
        self, x: Tensor, static_scale: Tensor | None = None, offset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [M, K] → (int8 [M, width], scales float32 [M], or the one that was given)."""
        count = x.shape[0]
        width = padded_width(self.columns)
        rows = 16 if count <= SPLIT_ROWS else 64
        integers = torch.empty((count, width), dtype=torch.int8, device=x.device)
        grid = (-(-count // rows), width // BLOCK)
        sizes = (count, self.columns, x.stride(0), self.blocks)
        limit = 2 ** (self.activation_bits - 1)
        if static_scale is not None:
            self._programs.quantize_static[grid](
                x, self.transform, offset, static_scale, integers, *sizes, width,
                LIMIT=limit, ROWS=rows, enable_fp_fusion=False,
            )  # fmt: skip
            return integers, static_scale.reshape(())
        share = -(-self.blocks // _MAXIMA_PARTS)
        parts = -(-self.blocks // share)
        maxima = torch.empty((parts, count), device=x.device)
        scales = torch.empty(count, device=x.device)
        self._programs.row_maxima[(grid[0], parts)](
            x, self.transform, offset, maxima, *sizes, share, ROWS=rows, enable_fp_fusion=False
        )
        self._programs.quantize_dynamic[grid](
            x, self.transform, offset, maxima, scales, integers, *sizes, width, parts,
            CLIP=self.activation_clip, LIMIT=limit, ROWS=rows, enable_fp_fusion=False,
        )  # fmt: skip
        return integers, scales

    def multiply(
        self,
        integers: Tensor,
        scales: Tensor,
        out: Tensor,
        epilogue: Epilogue,
        tiling: Tiling | None = None,
    ) -> None:
        """Integers int8 [M, width] and their scales → out; weights have one scale per output.

        Args:
            tiling: None takes the measured one, or a first guess.
        """
        if tiling is None:
            tiling = self._tiling(integers, scales, out, epilogue)
        count, width = integers.shape
        size, per_row = self.out_features, _per_row(scales)
        grid = (-(-count // tiling.rows), -(-out.shape[1] // tiling.outputs))
        sides = {"ROWS": tiling.rows, "OUTPUTS": tiling.outputs}
        options = {
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
            "enable_fp_fusion": False,
        }
        bias, gate = epilogue.bias, epilogue.gate
        gain, stream = epilogue.residual_parts()
        if tiling.parts == 1 and gate is not None:
            self._programs.multiply_gated[grid](
                integers, self.weight, self.weight_scale, bias, scales, out,
                count, size // 2, width, per_row, KIND=gate, **sides, BYTES=tiling.bytes, **options,
            )  # fmt: skip
            return
        if tiling.parts == 1:
            self._programs.multiply[grid](
                integers, self.weight, self.weight_scale, bias, gain, stream, scales, out,
                count, size, width, per_row, **sides, BYTES=tiling.bytes, **options,
            )  # fmt: skip
            return
        share = tiling.share(width)
        parts = -(-(width // 2) // share)
        partial = torch.empty((parts, count, size), dtype=torch.int32, device=out.device)
        self._programs.multiply_part[(grid[0], -(-size // tiling.outputs), parts)](
            integers, self.weight, partial, count, size, width, share,
            **sides, BYTES=tiling.bytes, **options,
        )  # fmt: skip
        if gate is not None:
            self._programs.add_parts_gated[grid](
                partial, self.weight_scale, bias, scales, out,
                count, size // 2, parts, per_row, KIND=gate, **sides, enable_fp_fusion=False,
            )  # fmt: skip
            return
        self._programs.add_parts[grid](
            partial, self.weight_scale, bias, gain, stream, scales, out,
            count, size, parts, per_row, **sides, enable_fp_fusion=False,
        )  # fmt: skip

    def _tiling(self, integers: Tensor, scales: Tensor, out: Tensor, epilogue: Epilogue) -> Tiling:
        """The measured tiling of a product, or a guess where nothing is measured."""
        shape = (len(integers), self.out_features, integers.shape[1])
        if self._tuner is None:
            return first_guess(shape, self._processors)
        return self._tuner.choose(
            shape,
            lambda tiling: self.multiply(integers, scales, out, epilogue, tiling),
            gated=epilogue.gate is not None,
        )

    def _multiply_grouped(
        self, integers: Tensor, scales: Tensor, out: Tensor, epilogue: Epilogue
    ) -> None:
        gain, stream = epilogue.residual_parts()
        count, width = integers.shape
        rows = min(64, max(16, 1 << (count - 1).bit_length()))
        grid = (-(-count // rows), -(-self.out_features // 64))
        self._programs.multiply_grouped[grid](
            integers, self.weight, self.weight_scale, epilogue.bias, gain, stream, scales, out,
            count, self.out_features, width, self.weight_scale.shape[0], _per_row(scales),
            ROWS=rows, OUTPUTS=64, enable_fp_fusion=False,
        )  # fmt: skip

    def _check(self, what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        found = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.is_contiguous())
        if found != (dtype, self.device, shape, True):
            layout = "contiguous" if found[3] else "non-contiguous"
            raise PolicyError(
                f"{what} is {layout} {found[0]} {list(found[2])} on {found[1]}; the kernel needs "
                f"contiguous {dtype} {list(shape)} on {self.device}"
            )

    def _check_residual(self, x: Tensor, residual: Residual) -> None:
        wanted: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
            ("residual", residual.stream, x.dtype, (x.shape[0], self.out_features))
        ]
        if residual.gain is not None:
            wanted.append(("gain", residual.gain, torch.float32, (self.out_features,)))
        for what, tensor, dtype, shape in wanted:
            found = (tensor.dtype, tuple(tensor.shape), tensor.device, tensor.is_contiguous())
            if found != (dtype, shape, x.device, True):
                raise ObservationError(
                    f"{what} is {tensor.dtype} {list(tensor.shape)} with strides "
                    f"{tensor.stride()} on {tensor.device}; the kernel needs contiguous {dtype} "
                    f"{list(shape)} on {x.device}"
                )

    def _check_input(self, x: Tensor) -> None:
        fits = x.dtype in _FLOATS and x.ndim == 2 and x.shape[1] == self.columns
        if not fits or x.device != self.device:
            raise ObservationError(
                f"input is {x.dtype} {list(x.shape)} on {x.device}; the kernel needs float32, "
                f"bfloat16 or float16 [rows, {self.columns}] on {self.device}"
            )
        widest = max(abs(x.stride(0)), padded_width(self.columns), self.out_features)
        if x.shape[0] * widest >= _MOST_ELEMENTS:
            raise ObservationError(
                f"input {list(x.shape)} for {self.out_features} outputs: the kernel takes fewer "
                "than 2³¹ elements; give it fewer rows at a time"
            )
        if x.shape[1] > 1 and x.stride(1) != 1:
            raise ObservationError(
                f"input {list(x.shape)} has strides {x.stride()}: its rows must be contiguous; "
                "call .contiguous()"
            )


def _per_row(scales: Tensor) -> int:
    """Distance of one row's scale from the next: none where all rows share one."""
    return 0 if scales.ndim == 0 else 1


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
