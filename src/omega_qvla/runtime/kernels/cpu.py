"""The C++ kernels: transform, quantize and multiply in one call, on the processor at hand.

``csrc/w4a4.h`` describes the maths and the layout.  What this module adds is everything a tensor
knows and an address does not: dtypes, shapes, devices, lifetimes.  A layer's operands are brought
into the kernel's layout once (``PackedLinear``); a call then passes addresses that were looked up
at that time, which costs about a microsecond, against ten through PyTorch's dispatcher.  Under
``torch.compile`` the same computation is the operator ``omega_qvla::w4a4_linear``.

Without the extension (no compiler at installation) ``instruction_set()`` is None and callers use
``reference``; nothing here pretends otherwise.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError, ResourceError
from omega_qvla.threads import available_cores, check_threads

_EXTENSION = "omega_qvla.runtime.kernels._cpu"


def _compiled() -> ModuleType | None:
    """The kernels in C++; None where there was no compiler, or, said aloud, they do not load."""
    if find_spec(_EXTENSION) is None:
        return None
    try:
        return import_module(_EXTENSION)
    except ImportError as error:
        warnings.warn(
            f"the compiled kernels are installed but cannot be loaded ({error}), so the slow "
            "reference multiplies; install omega-qvla again on this machine",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_extension = _compiled()

PANEL = 32
"""Outputs per weight panel."""
BLOCK = 64
"""The transform block that the kernels fuse."""
_UNIT = 64
_ROW = 64


def instruction_sets() -> list[str]:
    """Names of the paths this processor can run, best first; empty without the extension."""
    if _extension is None:
        return []
    return [name for name, runs in _extension.instruction_sets() if runs]


def instruction_set() -> str | None:
    """The path that is used unless another is asked for; None without the extension."""
    names = instruction_sets()
    return names[0] if names else None


def peak_macs(name: str, threads: int = 1, seconds: float = 0.05) -> float:
    """Measured multiply-adds per second of a path's inner instructions, operands in registers.

    For ``avx2`` these are vpmaddubsw and vpaddw, for ``avx512-vnni`` vpdpbusd, for
    ``neon-dotprod`` sdot.

    Raises:
        ResourceError: this processor cannot run that path, or has fewer cores.
    """
    module, path, count = extension(), path_number(name), check_threads(threads)
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(lambda _: module.peak(path, seconds), range(count)))


def padded_width(columns: int, group: int | None) -> int:
    """Inputs per panel: ``columns`` filled up to whole groups and to whole rows of 64."""
    whole = columns if group is None else -(-columns // group) * group
    return -(-whole // _ROW) * _ROW


def supports(group: int | None, weight_bits: int, activation_bits: int) -> bool:
    """Whether the kernels can do this at all: 4-bit weights in groups of whole units."""
    whole_units = group is None or group % 4 == 0
    return weight_bits == 4 and activation_bits in (4, 8) and whole_units


class PackedLinear:
    """One layer's operands in the kernel's layout, and the call on them.

    Args:
        words: int32 [N, ceil(K'/8)] row-major nibbles (``artifact.packing``), contiguous, CPU; K'
            is K, filled up to whole blocks where there is a transform.
        weight_scale: float32 [N], or [N, ceil(K'/group)].
        columns: K, the width of the rows the call is given.
        group: inputs per weight scale, or None.
        transform: bfloat16 [ceil(K/64), 64, 64], or None.
        bias: float32 [N], or None.
        activation_bits: 4 or 8.
        activation_clip: share of a row's largest magnitude that a dynamic scale reaches to.
        path: instruction set; the best one when None.

    Raises:
        ResourceError: no extension, or a path this processor cannot run.
        PolicyError: operands of another dtype, device or shape.
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
        path: str | None = None,
    ) -> None:
        self._extension = extension()
        self._path = path_number(path or instruction_set() or "")
        self.out_features, self.columns = words.shape[0], columns
        self.activation_bits, self.activation_clip = activation_bits, activation_clip
        width = columns if transform is None else -(-columns // BLOCK) * BLOCK
        self.width, self.padded = width, padded_width(width, group)
        _check("weight", words, torch.int32, (self.out_features, -(-width // 8)))
        if not supports(group, 4, activation_bits):
            raise PolicyError(f"no kernel for group={group} with {activation_bits}-bit activations")
        self.groups = 1 if group is None else -(-width // group)
        scales = (self.out_features,) if group is None else (self.out_features, self.groups)
        _check("weight_scale", weight_scale, torch.float32, scales)
        if transform is not None:
            _check("transform", transform, torch.bfloat16, (width // BLOCK, BLOCK, BLOCK))
        if bias is not None:
            _check("bias", bias, torch.float32, (self.out_features,))
        self.group = self.padded if group is None else group
        self.panels = pack_panels(words, width, self.padded)
        self.weight_scale = _spread(weight_scale.reshape(self.out_features, -1).t())
        self.bias = None if bias is None else spread_bias(bias)
        self.transform = None if transform is None else transform.contiguous()
        self._pointers = (
            address(self.panels),
            address(self.weight_scale),
        )
        self._bias_pointer = address(self.bias)
        self._transform_pointer = address(self.transform)

    @property
    def weight(self) -> Tensor:
        """The weight in the kernel's layout."""
        return self.panels

    def words(self) -> Tensor:
        """The weight as row-major words again, int32 [N, ceil(K'/8)]."""
        return unpack_panels(self.panels, self.out_features, self.width, self.padded)

    def __call__(
        self,
        x: Tensor,
        static_scale: Tensor | None = None,
        threads: int = 1,
        *,
        offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x [..., K] float32 → [..., N] float32.

        Args:
            x: on the CPU, rows contiguous (and, of two dimensions, any distance apart).
            static_scale: float32, one number; None for one dynamic scale per row.
            threads: the caller and up to ``threads - 1`` helpers.
            offset: float32 [K'], subtracted from the transformed rows before they are rounded.
            bias: in place of the layer's own, filled up by ``spread_bias``.

        Raises:
            ObservationError: x has another dtype, device, shape or stride.
        """
        rows = x if x.ndim <= 2 else x.flatten(0, -2)
        if torch.compiler.is_compiling():
            return torch.ops.omega_qvla.w4a4_linear(
                rows, self.panels, self.weight_scale, self.bias if bias is None else bias,
                self.transform, offset, static_scale,
                self.out_features, self.group, self.activation_bits, self.activation_clip,
                self._path, threads,
            ).view(*x.shape[:-1], self.out_features)  # fmt: skip
        _check_input(rows, self.columns)
        out = torch.empty(*x.shape[:-1], self.out_features)
        self._extension.linear(
            self._path, threads, rows.data_ptr(), rows.stride(0), self._transform_pointer,
            address(offset), address(static_scale), *self._pointers,
            self._bias_pointer if bias is None else bias.data_ptr(),
            out.data_ptr(), self.out_features, rows.shape[0], self.out_features, self.columns,
            self.padded, self.group, self.groups, self.activation_bits, self.activation_clip,
        )  # fmt: skip
        return out


def pack_panels(words: Tensor, columns: int, padded: int) -> Tensor:
    """Row-major words int32 [N, ceil(K/8)] → uint8 [panels, padded/4, 64]."""
    panels = -(-words.shape[0] // PANEL)
    out = torch.empty((panels, padded // 4, _UNIT), dtype=torch.uint8)
    threads = available_cores()  # once per layer and load: it cannot be in anybody's way for long
    extension().pack(words.data_ptr(), words.shape[0], columns, padded, threads, out.data_ptr())
    return out


def unpack_panels(panels: Tensor, rows: int, columns: int, padded: int) -> Tensor:
    """The inverse of ``pack_panels``."""
    out = torch.empty((rows, -(-columns // 8)), dtype=torch.int32)
    threads = available_cores()
    extension().unpack(panels.data_ptr(), rows, columns, padded, threads, out.data_ptr())
    return out


def extension() -> ModuleType:
    """The C++ module.

    Raises:
        ResourceError: it was not built.
    """
    if _extension is None:
        raise ResourceError(
            "the C++ kernels are not installed: install a C++ compiler (apt-get install g++) and "
            "reinstall omega-qvla, or use the reference kernel"
        )
    return _extension


def path_number(name: str) -> int:
    """The extension's number of a path.

    Raises:
        ResourceError: no extension, or a path this processor cannot run.
    """
    known = [(number, *path) for number, path in enumerate(extension().instruction_sets())]
    for number, candidate, runs in known:
        if candidate == name and runs:
            return number
    raise ResourceError(
        f"this processor has no path {name!r}; it has {', '.join(instruction_sets())}"
    )


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def spread_bias(bias: Tensor) -> Tensor:
    """A bias [N] as the kernels read it: float32 [1, panels · 32]."""
    return _spread(bias.unsqueeze(0))


def _spread(rows: Tensor) -> Tensor:
    """[G, N] → contiguous [G, panels · 32], filled up with zeros."""
    missing = -rows.shape[1] % PANEL
    return torch.nn.functional.pad(rows, (0, missing)).contiguous()


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = (tensor.dtype, tensor.device.type, tuple(tensor.shape), tensor.is_contiguous())
    if found != (dtype, "cpu", shape, True):
        layout = "contiguous" if found[3] else "non-contiguous"
        raise PolicyError(
            f"{what} is {layout} {found[0]} {list(found[2])} on {found[1]}; the kernel needs "
            f"contiguous {dtype} {list(shape)} on cpu"
        )


def _check_input(x: Tensor, columns: int) -> None:
    if x.dtype is torch.float32 and x.ndim == 2 and x.shape[1] == columns and x.is_cpu:
        if columns == 1 or x.stride(1) == 1:
            return
        raise ObservationError(
            f"input [{x.shape[0]}, {columns}] has strides {x.stride()}: its rows must be "
            "contiguous; call .contiguous()"
        )
    raise ObservationError(
        f"input is {x.dtype} {list(x.shape)} on {x.device}; the kernel needs torch.float32 "
        f"[rows, {columns}] on cpu"
    )


def _linear_operator(
    x: Tensor,
    panels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    transform: Tensor | None,
    offset: Tensor | None,
    static_scale: Tensor | None,
    out_features: int,
    group: int,
    activation_bits: int,
    activation_clip: float,
    path: int,
    threads: int,
) -> Tensor:
    x = x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()
    _check_input(x, x.shape[1])
    padded = panels.shape[1] * 4
    out = torch.empty((x.shape[0], out_features))
    extension().linear(
        path, threads, x.data_ptr(), x.stride(0), address(transform), address(offset),
        address(static_scale), panels.data_ptr(), weight_scale.data_ptr(), address(bias),
        out.data_ptr(), out_features,
        x.shape[0], out_features, x.shape[1], padded, group, weight_scale.shape[0],
        activation_bits, activation_clip,
    )  # fmt: skip
    return out


def _linear_shape(
    x: Tensor,
    panels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    transform: Tensor | None,
    offset: Tensor | None,
    static_scale: Tensor | None,
    out_features: int,
    *sizes: float,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


_library = torch.library.Library("omega_qvla", "DEF")
_library.define(
    "w4a4_linear(Tensor x, Tensor panels, Tensor weight_scale, Tensor? bias, Tensor? transform, "
    "Tensor? offset, Tensor? static_scale, int out_features, int group, int activation_bits, "
    "float activation_clip, int path, int threads) -> Tensor"
)
_library.impl("w4a4_linear", _linear_operator, "CPU")
torch.library.register_fake("omega_qvla::w4a4_linear", _linear_shape, lib=_library)
