"""The GPU kernels: NVIDIA tensor cores multiply int8, weights stay in 4 bits.

``triton_device.py`` has the programs, ``triton_layout.py`` how they read a weight,
``triton_tuning.py`` how products are cut, ``triton_gpu.py`` whether there is a GPU for them.
This module adds what a tensor knows and a program does not: dtypes, shapes, devices, how many
programs to start.  A call is two to four launches: quantize (preceded by row maxima where the scale
is dynamic), multiply (followed by a sum where K was cut).  Nothing waits for the GPU, nothing is
read back, and a static scale is read from the device, so a captured graph may hold the calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.layers.elementwise import Gate
from omega_qvla.runtime.kernels.triton_gpu import programs
from omega_qvla.runtime.kernels.triton_layout import BLOCK, pack, padded_width, unpack
from omega_qvla.runtime.kernels.triton_tuning import SPLIT_ROWS, Tiling, Tuner, first_guess

NAME = "triton"
_MAXIMA_PARTS = 8
_MOST_COLUMNS = 1 << 17
"""16 · 128 · 8 · K must stay below 2³¹."""
_MOST_ELEMENTS = 1 << 31
"""The programs count elements in int32."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product after its scales, while it is still in registers.

    Attributes:
        bias: float32 [N], or None.
        gate: let the second half of the outputs pass through the first.
    """

    bias: Tensor | None = None
    gate: Gate | None = None


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
        *,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x [M, K] → [M, N] of the same dtype.

        Args:
            x: float32, bfloat16 or float16, rows contiguous (any distance apart).
            static_scale: float32, one number, on the device; None for one dynamic scale per row.
            offset: float32, filled up by ``spread_offset``; subtracted from the transformed rows
                before they are rounded.
            bias: float32 [N], in place of the layer's own.

        Raises:
            ObservationError: x has another dtype, device, shape or stride.
        """
        self._check_input(x)
        epilogue = Epilogue(self.bias if bias is None else bias)
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
        if tiling.parts == 1 and gate is not None:
            self._programs.multiply_gated[grid](
                integers, self.weight, self.weight_scale, bias, scales, out,
                count, size // 2, width, per_row, KIND=gate, **sides, BYTES=tiling.bytes, **options,
            )  # fmt: skip
            return
        if tiling.parts == 1:
            self._programs.multiply[grid](
                integers, self.weight, self.weight_scale, bias, scales, out,
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
            partial, self.weight_scale, bias, scales, out,
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
        count, width = integers.shape
        rows = min(64, max(16, 1 << (count - 1).bit_length()))
        grid = (-(-count // rows), -(-self.out_features // 64))
        self._programs.multiply_grouped[grid](
            integers, self.weight, self.weight_scale, epilogue.bias, scales, out,
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
