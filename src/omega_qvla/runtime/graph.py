"""One chunk as one CUDA graph: vision, prefix and all denoising steps launched at once.

A chunk is thousands of small programs.  Started one by one from Python they arrive later than the
GPU could begin them; captured once and replayed, the whole sequence is one launch.  A graph repeats
addresses, not intentions, and everything here follows from that:

* what it reads is copied into buffers of its own first, what it wrote is copied out before anybody
  else gets to see it;
* it belongs to one sequence of launches.  What fixes that sequence, shapes and dtypes of the
  encoded inputs, the number of chunks and of denoising steps, whether chunks are guided, is its
  key.  An instruction one token longer is another key, so graphs are kept by the dozen, least
  recently used out;
* what it reads beside its inputs (scales and modulation of the denoising steps, which others would
  be free to forget) is kept alive with it (``held``);
* its buffers serve one call at a time: calls from several threads take turns.

Before a sequence is captured it runs twice as it is: programs are compiled, tilings measured and
tables filled then, which a capture could not hold.  A capture that fails leaves its key to be
computed launch by launch, and that is said.  Each capture is said too: it takes as long as several
chunks, and a robot that waits for it should know why.

Nothing here knows CUDA but ``CudaGraphs``.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from omega_qvla.errors import ResourceError
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.native import NativePolicy, Pass
from omega_qvla.runtime.linear import QuantizedLinear

MOST = 32
"""Graphs that are kept.  The digits of a robot's state in pi0.5's prompt change its length by up to
two tokens a joint; graphs share the memory they compute in, so one more costs little."""
_WARM_UPS = 2
"""The first may make what the second finds: 256 scales are remembered, then all forgotten."""

Say = Callable[[str], None]


class GraphWarning(UserWarning):
    """A graph is being captured, or could not be."""


@dataclass(eq=False)
class Recording:
    """A captured sequence of launches.

    Attributes:
        replay: launch it again.
        output: where it writes its result, at every replay.
    """

    replay: Callable[[], Any]
    output: Tensor


class Capturing(Protocol):
    """What turns work into a recording of its launches."""

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        """Run the work as capturing wants it to have been run before."""
        ...

    def capture(self, work: Callable[[], Tensor]) -> Recording:
        """Record the work's launches.

        Raises:
            RuntimeError: something in it cannot be captured, or memory ran out.
        """
        ...


class CudaGraphs:
    """Captures on a GPU.

    All recordings compute in one pool of memory.  That is safe because they are replayed one at a
    time and their outputs are copied away before the next one.

    Args:
        device: ``cuda:N``.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._pool: Any = None
        self._alive: WeakSet[Recording] = WeakSet()

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(stream)

    def capture(self, work: Callable[[], Tensor]) -> Recording:
        if not self._alive:  # a pool that nobody uses any more may be gone
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, capture_error_mode="thread_local"
            ):  # other threads may go on
                output = work()
        recording = Recording(graph.replay, output)
        self._alive.add(recording)
        return recording


def _warn(message: str) -> None:
    warnings.warn(message, GraphWarning, stacklevel=3)


@dataclass(frozen=True)
class _Key:
    """What fixes a sequence of launches."""

    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    noise: tuple[torch.Size, torch.dtype]
    steps: int
    guided: bool

    @classmethod
    def of(
        cls, inputs: Sequence[Tensor], noise: Tensor, steps: int, guidance: Guidance | None
    ) -> _Key:
        shapes = tuple((part.shape, part.dtype) for part in inputs)
        return cls(shapes, (noise.shape, noise.dtype), steps, guidance is not None)

    def __str__(self) -> str:
        shapes = ", ".join(str(list(shape)) for shape, _ in self.inputs)
        guided = ", guided" if self.guided else ""
        return f"inputs {shapes}, noise {list(self.noise[0])}, {self.steps} steps{guided}"


@dataclass(frozen=True)
class _Graph:
    """A recording, the buffers it reads, and what must outlive it.

    Attributes:
        recording: None where capturing failed.
        inputs, noise, guidance: what is copied into before a replay.
        held: tensors that the launches read by address.
    """

    recording: Recording | None = None
    inputs: tuple[Tensor, ...] = ()
    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    guidance: Guidance | None = None
    held: object = None

    def fill(self, inputs: Sequence[Tensor], noise: Tensor, guidance: Guidance | None) -> None:
        buffers = (*self.inputs, self.noise, *(self.guidance or ()))
        for buffer, given in zip(buffers, (*inputs, noise, *(guidance or ())), strict=True):
            buffer.copy_(given)


class ChunkGraphs:
    """A policy's pass that is captured once per key and replayed from then on.

    Args:
        compute: the pass as it is.
        backend: what captures.
        device: where the buffers are.
        most: graphs that are kept; one shape more, and the least recently used goes.
        held: what a capture with this many steps reads beside its inputs, to be kept alive.
        say: told of every capture and of every failure to capture; a ``GraphWarning`` by default.

    Raises:
        ResourceError: no graph may be kept.
    """

    def __init__(
        self,
        compute: Pass,
        backend: Capturing,
        device: torch.device | str,
        *,
        most: int = MOST,
        held: Callable[[int], object] = lambda _: None,
        say: Say = _warn,
    ) -> None:
        if most < 1:
            raise ResourceError(f"{most} graphs: keep at least one, or load with graph=False")
        self._compute, self._backend, self._device = compute, backend, device
        self._most, self._held, self._say = most, held, say
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._turn = Lock()

    @torch.inference_mode()
    def __call__(
        self,
        inputs: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Encoded inputs of B observations and noise [B, H, A] → chunks [B, H, A], a new tensor.

        Raises:
            Whatever the pass itself raises.
        """
        key = _Key.of(inputs, noise, steps, guidance)
        with self._turn:
            graph = self._graphs.pop(key, None) or self._capture(
                key, inputs, noise, steps, guidance
            )
            self._graphs[key] = graph
            while len(self._graphs) > self._most:
                self._graphs.popitem(last=False)
            if graph.recording is None:
                return self._compute(inputs, noise, steps, guidance)
            graph.fill(inputs, noise, guidance)
            graph.recording.replay()
            return graph.recording.output.clone()

    def _capture(
        self,
        key: _Key,
        inputs: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        guidance: Guidance | None,
    ) -> _Graph:
        full = len(self._graphs) >= self._most
        room = f"; {self._most} graphs are kept, the one longest unused goes" if full else ""
        self._say(f"capturing a graph for {key}{room}: this one chunk takes longer")
        buffers = tuple(self._buffer(part) for part in inputs)
        guiding = None if guidance is None else Guidance(*map(self._buffer, guidance))
        graph = _Graph(None, buffers, self._buffer(noise), guiding)
        graph.fill(inputs, noise, guidance)

        def work() -> Tensor:
            return self._compute(graph.inputs, graph.noise, steps, graph.guidance)

        self._backend.warm_up(work)
        try:
            recording = self._backend.capture(work)
        except RuntimeError as error:
            self._say(
                f"no graph for {key}: {type(error).__name__}: {error}. Such chunks are computed "
                "launch by launch, which is slower; graph=False does so from the start"
            )
            return _Graph()
        return replace(graph, recording=recording, held=self._held(steps))

    def _buffer(self, given: Tensor) -> Tensor:
        return torch.empty(given.shape, dtype=given.dtype, device=self._device)


def use_graphs(
    policy: NativePolicy,
    *,
    compute: Pass | None = None,
    backend: Capturing | None = None,
    most: int = MOST,
    say: Say = _warn,
) -> ChunkGraphs:
    """Let a policy sample through graphs.

    Args:
        policy: on a GPU; it is changed.
        compute: the pass to capture; the policy's own by default.
        backend: what captures; the policy's GPU by default.
        most, say: as in ``ChunkGraphs``.
    """
    graphs = ChunkGraphs(
        policy.compute if compute is None else compute,
        CudaGraphs(str(policy.device)) if backend is None else backend,
        policy.device,
        most=most,
        held=lambda steps: (policy.schedule(steps), read_by_address(policy)),
        say=say,
    )
    policy.use_pass(graphs)
    return graphs


def read_by_address(policy: NativePolicy) -> list[Tensor]:
    """What launches of this policy read and its linears may forget: scales, offsets, biases."""
    linears = (child for child in policy.module.modules() if isinstance(child, QuantizedLinear))
    return [value for linear in linears for value in linear.values_at_hand()]
