"""llama.cpp's 4-bit matrix product as a peer: Q4_0 weights times Q8_0 activations.

It is the widest used 4-bit path for processors: blocks of 32 weights with one 16-bit scale each,
activations rounded to 8 bits per block of 32 when the product is computed.  It multiplies 8-bit
activations where ours are 4-bit, and has no transform, so it is a peer in speed, not in what it
computes.

Nothing of llama.cpp is part of this project.  Whoever has its libraries (a build of it, or
``llama-cpp-python``) names their folder, and they are called here through their C interface.
Weights go into the layout that llama.cpp itself would choose on this processor (its repacking
buffer type, where it has one).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.errors import ResourceError

LLAMA_CPP = "llama.cpp Q4_0"
"""What rows call this peer."""
Q4_0_BYTES_PER_WEIGHT = 18 / 32
_F32, _Q4_0 = 0, 2
_BLOCK = 32
_REPACK_ROWS = 8
_CPU_DEVICE = 0


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_version": (c_char_p, []),
    "ggml_log_set": (None, [_LogCallback, c_void_p]),
    "ggml_init": (c_void_p, [_InitParameters]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
    ),
    "ggml_backend_dev_by_type": (c_void_p, [c_int]),
    "ggml_backend_dev_init": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class Ggml:
    """llama.cpp's tensor library, loaded from a folder.

    Args:
        folder: where ``libggml.so``, ``libggml-base.so`` and ``libggml-cpu.so`` lie.

    Raises:
        ResourceError: they are not there, or lack a function used here.
    """

    def __init__(self, folder: Path) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        libraries = [_open(folder, name) for name in ("ggml-base", "ggml-cpu", "ggml")]
        for name, (result, arguments) in _FUNCTIONS.items():
            found = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if found is None:
                raise ResourceError(
                    f"the llama.cpp libraries in {folder} have no {name}; this was written for "
                    "ggml 0.25, a version much older or newer does not fit"
                )
            found.restype, found.argtypes = result, arguments
            self._functions[name] = found
        self._silence = _LogCallback(lambda _level, _text, _data: None)  # a line for every weight
        self.call("ggml_log_set", self._silence, None)
        self.version: str = self.call("ggml_version").decode()
        self._device = self.call("ggml_backend_dev_by_type", _CPU_DEVICE)
        self._backend = self.call("ggml_backend_dev_init", self._device, None)
        if not self._backend:
            raise ResourceError(f"the llama.cpp libraries in {folder} have no CPU backend")

    def supports(self, columns: int) -> bool:
        """Whether its format can hold rows of that width: whole blocks of 32."""
        return columns % _BLOCK == 0

    def linear(
        self, rows: Tensor, out_features: int, *, copies: int, threads: int, seed: int = 0
    ) -> Callable[[], Tensor]:
        """A call that multiplies ``rows`` by the next of ``copies`` equal random weights.

        Args:
            rows: float32 [M, K], K a multiple of 32.
            out_features: N.

        Returns:
            A function without arguments; its result [M, N] float32 is overwritten by later calls.

        Raises:
            ResourceError: not enough memory.
        """
        m, k = rows.shape
        weight = random_weight(out_features, k, seed)
        packed = torch.empty(int(out_features * k * Q4_0_BYTES_PER_WEIGHT), dtype=torch.uint8)
        self.call(
            "ggml_quantize_chunk", _Q4_0, weight.data_ptr(), packed.data_ptr(), 0, out_features, k,
            None,
        )  # fmt: skip
        del weight
        held = _Held(self)
        weights = held.context(copies)
        tensors = [
            self.call("ggml_new_tensor_2d", weights, _Q4_0, k, out_features) for _ in range(copies)
        ]
        held.allocate(weights, self._weight_buffer(out_features))
        for tensor in tensors:
            self.call("ggml_backend_tensor_set", tensor, packed.data_ptr(), 0, packed.numel())
        work = held.context(copies + 1, graphs=copies)
        x = self.call("ggml_new_tensor_2d", work, _F32, k, m)
        products = [self.call("ggml_mul_mat", work, tensor, x) for tensor in tensors]
        held.allocate(work, self.call("ggml_backend_dev_buffer_type", self._device))
        source = rows.contiguous()
        self.call("ggml_backend_tensor_set", x, source.data_ptr(), 0, source.nbytes)
        turns = [(self._graph(work, y), self._view(y, m, out_features)) for y in products]
        return _Product(self, cycle(turns), threads, held)

    def compute(self, graph: Any, threads: int) -> None:
        """Run one graph.

        Raises:
            ResourceError: llama.cpp reports that it failed.
        """
        self.call("ggml_backend_cpu_set_n_threads", self._backend, threads)
        status = self.call("ggml_backend_graph_compute", self._backend, graph)
        if status != 0:
            raise ResourceError(f"llama.cpp could not multiply (status {status})")

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the C interface."""
        return self._functions[name](*arguments)

    def _weight_buffer(self, out_features: int) -> Any:
        """The buffer type llama.cpp keeps such weights in."""
        plain = self.call("ggml_backend_dev_buffer_type", self._device)
        registry = self.call("ggml_backend_dev_backend_reg", self._device)
        address = self.call(
            "ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address or out_features % _REPACK_ROWS:
            return plain
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self._device)
        for candidate in extra:
            if not candidate:
                break
            if self.call("ggml_backend_buft_name", candidate) == b"CPU_REPACK":
                return candidate
        return plain

    def _graph(self, context: Any, product: Any) -> Any:
        graph = self.call("ggml_new_graph", context)
        self.call("ggml_build_forward_expand", graph, product)
        return graph

    def _view(self, tensor: Any, rows: int, columns: int) -> Tensor:
        address = self.call("ggml_get_data", tensor)
        memory = (c_float * (rows * columns)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


@dataclass(frozen=True)
class _Product:
    """The call that ``Ggml.linear`` returns."""

    ggml: Ggml
    turns: Iterator[tuple[Any, Tensor]]
    threads: int
    held: _Held

    def __call__(self) -> Tensor:
        graph, result = next(self.turns)
        self.ggml.compute(graph, self.threads)
        return result


class _Held:
    """Contexts and buffers of one peer, given back when it is dropped."""

    def __init__(self, ggml: Ggml) -> None:
        self._call = ggml.call
        self._contexts: list[Any] = []
        self._buffers: list[Any] = []

    def context(self, tensors: int, *, graphs: int = 0) -> Any:
        """Room for the descriptions of that many tensors and graphs, without their data."""
        size = tensors * self._call("ggml_tensor_overhead")
        size += graphs * self._call("ggml_graph_overhead")
        self._contexts.append(self._call("ggml_init", _InitParameters(size + 4096, None, True)))
        return self._contexts[-1]

    def allocate(self, context: Any, buffer_type: Any) -> None:
        """Memory for all tensors of a context."""
        buffer = self._call("ggml_backend_alloc_ctx_tensors_from_buft", context, buffer_type)
        if not buffer:
            raise ResourceError("not enough memory for llama.cpp's weights")
        self._buffers.append(buffer)

    def __del__(self) -> None:
        for buffer in self._buffers:
            self._call("ggml_backend_buffer_free", buffer)
        for context in self._contexts:
            self._call("ggml_free", context)


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    """The float32 weight [rows, columns] that a peer quantizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, columns), generator=generator)


def _open(folder: Path, name: str) -> ctypes.CDLL:
    found = sorted(folder.glob(f"lib{name}.so*")) + sorted(folder.glob(f"lib{name}.dylib"))
    if not found:
        raise ResourceError(
            f"{folder} has no lib{name}.so; give the folder of llama.cpp's shared libraries: of "
            "llama-cpp-python that is llama_cpp/lib, of a build its bin"
        )
    try:
        return ctypes.CDLL(str(found[0].resolve()), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ResourceError(f"cannot load {found[0]}: {error}") from error
