"""``QuantizedLinear``: integers in memory, integers multiplied.

The module holds the packed integers, the scales, the block transform and the bias, and nothing
else: there is no dequantized weight to fall back to.  It may stand for several fused linears, whose
outputs it concatenates (``splits``).  Where a recipe leaves a low-rank part of the weight in 16
bits, those two thin matrices are multiplied beside the integers.

The integers are kept once.  As made or loaded they are row-major words (``weight_packed``); for the
C++ and the GPU kernels they are brought into a layout of their own (``prepare``) and the words are
given up, to be made again from it when the module is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.devices import Gpu
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import FlowClock
from omega_qvla.policies.layers.elementwise import Gate
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.recipe import DEFAULT_RECIPE
from omega_qvla.runtime.kernels import cpu, reference, triton
from omega_qvla.runtime.kernels.triton_layout import spread_offset
from omega_qvla.runtime.kernels.triton_tuning import Tuner
from omega_qvla.runtime.schedule import Schedule, StepValues
from omega_qvla.threads import check_threads, usable_threads

REFERENCE = "reference"


def best_kernel() -> str:
    """The kernel that is taken here when none is asked for."""
    return cpu.instruction_set() or REFERENCE


class QuantizedLinear(nn.Module):
    """A linear layer (or several fused ones) that multiplies integers.

    Args:
        weight_packed: int32 [N, K'/8] for 4-bit weights, or int8 [N, K'] for 8-bit ones.
        weight_scale: float32 [N] or [N, K'/group].
        in_features: input width before padding.
        splits: output widths of the fused linears.
        activation_bits: width of the activation integers.
        transform: [K'/B, B, B] block transform, or None.
        permutation: int32 [K'] order in which the transform reads its inputs, or None.
        activation_scale: [steps] static scales, or None for per-token dynamic scales.
        activation_offset: bfloat16 [steps, K'] subtracted from transformed inputs before they are
            rounded, or None.
        activation_step_times: [steps] flow times of scales and offsets.
        bias: [N], or None; with offsets [steps, N], their product with the weight included.
        group: input channels per weight scale, or None.
        low_rank_down: bfloat16 [r, K] of a 16-bit branch on the untransformed input, or None.
        low_rank_up: bfloat16 [N, r], or None.
        activation_clip: share of a token's largest magnitude that a dynamic scale reaches to.
        clock: tells the flow time when scales are per step.
        kernel: ``reference``, the name of an instruction set (``cpu.instruction_sets()``), or
            ``triton`` where the weight is on a GPU; None takes the best there is.
        threads: for the C++ kernels; None follows ``torch.get_num_threads()``.
        gpu: the GPU the weight is on, and what chooses tilings there.

    Raises:
        ResourceError: a kernel this machine cannot run, or more threads than cores.
        PolicyError: the kernel asked for, or the only one for this device, cannot do this layer.
    """

    def __init__(
        self,
        *,
        weight_packed: Tensor,
        weight_scale: Tensor,
        in_features: int,
        splits: tuple[int, ...],
        activation_bits: int,
        transform: Tensor | None,
        permutation: Tensor | None,
        activation_scale: Tensor | None,
        activation_step_times: Tensor | None,
        bias: Tensor | None,
        group: int | None,
        clock: FlowClock,
        low_rank_down: Tensor | None = None,
        low_rank_up: Tensor | None = None,
        activation_clip: float = 1.0,
        activation_offset: Tensor | None = None,
        kernel: str | None = None,
        threads: int | None = None,
        gpu: GpuRun | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(splits)
        self.splits, self.group, self.activation_bits = splits, group, activation_bits
        self.activation_clip = activation_clip
        self.weight_packed: Tensor | None
        self.weight_scale: Tensor
        self.transform: Tensor | None
        self.permutation: Tensor | None
        self.activation_scale: Tensor | None
        self.activation_offset: Tensor | None
        self.activation_step_times: Tensor | None
        self.bias: Tensor | None
        self.low_rank_down: Tensor | None
        self.low_rank_up: Tensor | None
        self.register_buffer("weight_packed", weight_packed)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("transform", transform)
        self.register_buffer("permutation", permutation)
        self.register_buffer("activation_scale", activation_scale)
        self.register_buffer("activation_offset", activation_offset)
        self.register_buffer("activation_step_times", activation_step_times)
        self.register_buffer("bias", bias)
        # One layout, as made and as loaded: a float product's last bit depends on it.
        self.register_buffer(
            "low_rank_down", None if low_rank_down is None else low_rank_down.contiguous()
        )
        self.register_buffer(
            "low_rank_up", None if low_rank_up is None else low_rank_up.t().contiguous().t()
        )
        self._clock = clock
        device = weight_packed.device
        self.threads = None if threads is None else check_threads(threads)
        self._gpu = gpu
        self.kernel = self._choose_gpu(kernel) if device.type == "cuda" else self._choose(kernel)
        self._packed: cpu.PackedLinear | triton.PackedLinear | None = None
        self._whole: cpu.PackedLinear | None = None  # the C++ call that is all of this layer
        self._schedule = Schedule(activation_step_times, self._step_table())

    @classmethod
    def from_site(
        cls, quantized: QuantizedSite, clock: FlowClock, kernel: str | None = None
    ) -> QuantizedLinear:
        """Pack a freshly quantized, realizable site."""
        integers, branch = quantized.weight.integers, quantized.low_rank
        return cls(
            weight_packed=pack_int4(integers) if quantized.weight_bits == 4 else integers,
            weight_scale=quantized.weight.scale.contiguous(),
            in_features=quantized.in_features,
            splits=quantized.splits,
            activation_bits=quantized.activations.bits,
            transform=_stored_transform(quantized),
            permutation=_stored_permutation(quantized),
            activation_scale=quantized.activation_scale,
            activation_step_times=quantized.activation_times,
            bias=quantized.bias,
            group=quantized.weight.group,
            clock=clock,
            low_rank_down=None if branch is None else branch.down.to(torch.bfloat16),
            low_rank_up=None if branch is None else branch.up.to(torch.bfloat16),
            activation_clip=quantized.activations.share,
            activation_offset=_stored_offset(quantized),
            kernel=kernel,
        )

    def _step_table(self) -> StepValues:
        """What depends on flow time, as the layer's kernel reads it."""
        if self.activation_offset is None:
            return StepValues(self.activation_scale)
        offset, bias = self.activation_offset.to(torch.float32), self.bias
        assert bias is not None
        if self.kernel == triton.NAME:
            offset = spread_offset(offset)
        elif self.kernel != REFERENCE:
            bias = torch.stack([cpu.spread_bias(row) for row in bias])
        return StepValues(self.activation_scale, offset, bias)

    def _own_bias(self) -> Tensor | None:
        """The bias that is the same at all times."""
        return self.bias if self.activation_offset is None else None

    def _weight_bits(self) -> int:
        assert self.weight_packed is not None
        return 8 if self.weight_packed.dtype == torch.int8 else 4

    def _choose(self, kernel: str | None) -> str:
        """The kernel that will run on the CPU, by name."""
        assert self.weight_packed is not None
        if kernel == triton.NAME:
            raise PolicyError(
                f"kernel {triton.NAME!r} runs on a GPU, this layer is on "
                f"{self.weight_packed.device}; load with device='cuda'"
            )
        bits = self._weight_bits()
        possible = self.weight_packed.device.type == "cpu" and cpu.supports(
            self.group, bits, self.activation_bits
        )
        if kernel is None:
            return best_kernel() if possible else REFERENCE
        if kernel != REFERENCE and not possible:
            raise PolicyError(
                f"kernel {kernel!r} multiplies 4-bit weights on the CPU, in groups of a multiple "
                f"of 4; this layer has {bits}-bit weights, group {self.group}, on "
                f"{self.weight_packed.device}"
            )
        if kernel != REFERENCE:
            cpu.path_number(kernel)
        return kernel

    def _choose_gpu(self, kernel: str | None) -> str:
        """The one kernel there is for GPUs, if it can do this layer."""
        if kernel not in (None, triton.NAME):
            raise PolicyError(
                f"kernel {kernel!r} runs on the CPU, this layer is on a GPU; leave kernel out, or "
                f"ask for {triton.NAME!r}"
            )
        obstacle = triton.supports(
            self.group,
            self._weight_bits(),
            self.activation_bits,
            None if self.transform is None else self.transform.shape[-1],
            self.permutation is not None,
        )
        if obstacle is not None:
            raise PolicyError(
                f"no GPU kernel for this layer: {obstacle}. Load it with device='cpu', or quantize "
                f"with a recipe such as {DEFAULT_RECIPE!r}"
            )
        return triton.NAME

    def prepare(self) -> None:
        """Bring the weight into the kernel's layout now rather than at the first call."""
        if self.kernel == REFERENCE or self._packed is not None:
            return
        assert self.weight_packed is not None
        if self.kernel == triton.NAME:
            self._packed = self._pack_gpu()
        else:
            self._packed = packed = self._pack()
            self._whole = packed if self._fused() and self.low_rank_down is None else None
        self.weight_packed = None

    def _pack(self) -> cpu.PackedLinear:
        assert self.weight_packed is not None
        return cpu.PackedLinear(
            self.weight_packed,
            self.weight_scale,
            columns=self._width(),
            group=self.group,
            transform=self.transform if self._fused() else None,
            bias=self._own_bias(),
            activation_bits=self.activation_bits,
            activation_clip=self.activation_clip,
            path=self.kernel,
        )

    def _pack_gpu(self) -> triton.PackedLinear:
        assert self.weight_packed is not None
        run = self._gpu
        return triton.PackedLinear(
            self.weight_packed,
            self.weight_scale,
            columns=self.in_features,
            group=self.group,
            transform=self.transform,
            bias=self._own_bias(),
            activation_bits=self.activation_bits,
            activation_clip=self.activation_clip,
            processors=1 if run is None else run.gpu.processors,
            tuner=None if run is None else run.tuner,
        )

    def packed_tensors(self) -> list[Tensor]:
        """What the kernels hold in their own layout, beside the module's buffers."""
        held = [] if self._packed is None else [self._packed.weight]
        return held if self.activation_offset is None else [*held, *self._schedule.copies()]

    def values_at_hand(self) -> list[Tensor]:
        """What was given to the kernels per step; a captured graph reads it again."""
        return self._schedule.known()

    def stored(self) -> dict[str, Tensor]:
        """The module's tensors as an artifact holds them, by kind."""
        tensors = dict(self.named_buffers())
        if self._packed is not None:
            tensors["weight_packed"] = self._packed.words()
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N].

        Raises:
            ObservationError: x has another width.
        """
        if x.shape[-1] != self.in_features:
            raise ObservationError(
                f"a quantized linear of {self.in_features} inputs got {list(x.shape)}"
            )
        whole = self._whole
        if whole is not None and x.dtype is torch.float32 and x.stride(-1) == 1:
            now = self._now()
            return whole(x, now.scale, self._threads_now(), offset=now.offset, bias=now.bias)
        rows = x.reshape(-1, self.in_features)
        if self.kernel == triton.NAME:
            y = self._multiply_gpu(rows)
        elif self.kernel == REFERENCE:
            y = self._multiply_reference(rows.to(torch.float32))
        else:
            y = self._multiply(rows.to(torch.float32))
        if self.low_rank_down is not None and self.low_rank_up is not None:
            thin = rows.to(torch.float32) @ self.low_rank_down.t().float()
            y = y + thin @ self.low_rank_up.t().float()
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def can_gate(self) -> bool:
        """Whether ``gated`` exists: two linears of one width on a GPU, in 4-bit integers alone."""
        halves = len(self.splits) == 2 and len(set(self.splits)) == 1
        plain = self.group is None and self.low_rank_down is None
        return self.kernel == triton.NAME and halves and plain

    def gated(self, x: Tensor, kind: Gate) -> Tensor:
        """x [..., K] → activation(gate(x)) · up(x) [..., N/2], of a fused gate and up projection.

        Raises:
            PolicyError: another layer; see ``can_gate``.
            ObservationError: x has another width.
        """
        if not self.can_gate():
            raise PolicyError("only a gate and an up projection on a GPU are multiplied as one")
        y = self._multiply_gpu(x.reshape(-1, x.shape[-1]), kind)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _multiply_gpu(self, rows: Tensor, gate: Gate | None = None) -> Tensor:
        """Rows [M, K] → [M, N] of the same dtype, on the GPU; [M, N/2] if they end in a gate."""
        self.prepare()
        assert isinstance(self._packed, triton.PackedLinear)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        now = self._now()
        if gate is not None:
            return self._packed.gated(rows, gate, now.scale, offset=now.offset, bias=now.bias)
        return self._packed(rows, now.scale, offset=now.offset, bias=now.bias)

    def _multiply(self, rows: Tensor) -> Tensor:
        """Rows [M, K] float32 → [M, N] float32, by the C++ kernels."""
        self.prepare()
        assert isinstance(self._packed, cpu.PackedLinear)
        now, offset = self._now(), None
        if self._fused():
            offset = now.offset
        else:
            rows = self.transform_input(rows)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        return self._packed(rows, now.scale, self._threads_now(), offset=offset, bias=now.bias)

    def _threads_now(self) -> int:
        return usable_threads(self.threads)

    def _multiply_reference(self, rows: Tensor) -> Tensor:
        q, scale = self.quantize_input(rows)
        y = reference.scaled_matmul(q, self.integers(), self.weight_scale, self.group) * scale
        bias = self.bias if self.activation_offset is None else self._now().bias
        return y if bias is None else y + bias

    def _now(self) -> StepValues:
        return self._schedule.at(self._clock.time)

    def quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [M, K] float32 → (int8 [M, K'], scale [M, 1] or scalar)."""
        rows = self.transform_input(rows)
        missing = self._padded_width() - rows.shape[-1]
        if missing:
            rows = torch.nn.functional.pad(rows, (0, missing))
        scale = self.input_scale(rows)
        return reference.quantize_rows(rows, scale, self.activation_bits), scale

    def integers(self) -> Tensor:
        """The weight integers as int8 [N, K'], unpacked for this call."""
        words = self.weight_packed if self._packed is None else self._packed.words()
        assert words is not None
        return words if words.dtype == torch.int8 else reference.unpack_words(words)

    def input_scale(self, transformed: Tensor) -> Tensor:
        """Activation scale of transformed rows [M, K']: static scalar, or per token [M, 1]."""
        if self.activation_scale is None:
            return reference.row_scales(transformed, self.activation_bits, self.activation_clip)
        scale = self._now().scale
        assert scale is not None
        return scale

    def transform_input(self, rows: Tensor) -> Tensor:
        """Rows [M, K] permuted, transformed and without their offset, [M, K']."""
        if self.permutation is not None:
            missing = self.permutation.shape[0] - rows.shape[-1]
            rows = torch.nn.functional.pad(rows, (0, missing)).index_select(1, self.permutation)
        if self.transform is not None:
            rows = reference.transform_blocks(rows, self.transform)
        offset = self._now().offset
        return rows if offset is None else rows - offset[: rows.shape[-1]]

    def _fused(self) -> bool:
        """Whether the kernel transforms as well; it knows one block size and no permutation."""
        if self.permutation is not None:
            return False
        return self.transform is None or self.transform.shape[-1] == cpu.BLOCK

    def _width(self) -> int:
        """Columns the kernel is given: transformed ones where it does not transform itself."""
        if self.transform is None or self._fused():
            return self.in_features
        return self.transform.shape[0] * self.transform.shape[1]

    def _padded_width(self) -> int:
        """Columns of the row-major weight, fillers included."""
        if self.weight_packed is not None and self.weight_packed.dtype == torch.int8:
            return self.weight_packed.shape[1]
        width = self.in_features
        if self.transform is not None:
            width = self.transform.shape[0] * self.transform.shape[1]
        return -(-width // 8) * 8


@dataclass(frozen=True)
class GpuRun:
    """Where and how linears run on a GPU.

    Attributes:
        gpu: what was found.
        tuner: measures tilings; None keeps to first guesses.
    """

    gpu: Gpu
    tuner: Tuner | None = None


def _stored_transform(quantized: QuantizedSite) -> Tensor | None:
    """Transforms are rounded to bfloat16 when they are made, so storing them as such is exact."""
    if quantized.transform is None:
        return None
    return quantized.transform.matrix.to(torch.bfloat16)


def _stored_offset(quantized: QuantizedSite) -> Tensor | None:
    """Offsets, like transforms, are bfloat16 from the start."""
    return None if quantized.offset is None else quantized.offset.to(torch.bfloat16)


def _stored_permutation(quantized: QuantizedSite) -> Tensor | None:
    if quantized.transform is None or quantized.transform.permutation is None:
        return None
    return quantized.transform.permutation.to(torch.int32)
