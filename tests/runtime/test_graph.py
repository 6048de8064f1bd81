"""A chunk captured once and replayed, with a recorder in the place of CUDA.

The recorder really replays: it computes again from the buffers it was given, into the buffer it
handed out, as a CUDA graph does.  What it cannot show is that CUDA captures what a policy launches.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graph_recorder import Recorder
from torch import Tensor

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, ResourceError
from omega_qvla.policies.layers.elementwise import Elementwise
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime import graph as module
from omega_qvla.runtime import load as loading
from omega_qvla.runtime.fused import CpuElementwise
from omega_qvla.runtime.graph import ChunkGraphs, GraphWarning, use_graphs
from omega_qvla.runtime.kernels import triton_gpu as gpu
from omega_qvla.runtime.linear import REFERENCE, QuantizedLinear, best_kernel


def double(inputs: Any, noise: Tensor, steps: int, guidance: Any = None) -> Tensor:
    return inputs[0].sum() + steps * noise


def make(recorder: Recorder, **options: Any) -> tuple[ChunkGraphs, list[str]]:
    said: list[str] = []
    return ChunkGraphs(double, recorder, "cpu", say=said.append, **options), said


def sample_in_every_way(policy: NativePolicy, observations: Observations) -> list[np.ndarray]:
    """One observation, also in fewer steps; several noises; several observations."""
    source = np.random.default_rng(3)
    noises = [source.standard_normal(policy.noise_shape).astype(np.float32) for _ in observations]
    alone = [
        policy.sample_actions(item, noise, steps=steps)
        for item, noise in zip(observations, noises, strict=True)
        for steps in (None, 2)
    ]
    encoded = [policy.encode(item) for item in observations]
    several = policy.sample_noises(observations[0], noises).numpy()
    return [*alone, several, *policy.sample_batch(encoded, noises)]


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
@pytest.mark.parametrize("recipe", [None, "omega-w4a4-static"])
def test_chunks_are_those_of_the_policy_bit_for_bit(
    family: str, recipe: str | None, request: pytest.FixtureRequest, few: Observations
) -> None:
    policy = request.getfixturevalue(family).clone()
    if recipe is not None:
        policy = oq.quantize(policy, few, recipe).policy
    wanted = sample_in_every_way(policy, few)
    recorder = Recorder()
    use_graphs(policy, backend=recorder, say=lambda _: None)
    for _ in range(2):
        found = sample_in_every_way(policy, few)
        assert all(np.array_equal(x, y) for x, y in zip(found, wanted, strict=True))
    # Two step counts alone, and a batch that several noises and several observations share.
    assert (recorder.captured, recorder.replayed) == (3, 16)


def test_a_copy_of_a_policy_starts_without_graphs(small_policy: NativePolicy) -> None:
    policy = small_policy.clone()
    use_graphs(policy, backend=Recorder())
    assert policy.clone()._pass is None


def test_one_key_is_captured_once_and_said_once() -> None:
    recorder = Recorder()
    graphs, said = make(recorder)
    for value in range(3):
        graphs((torch.full((2,), float(value)),), torch.ones(1, 2, 2), 4)
    assert (recorder.warmed, recorder.captured, recorder.replayed) == (1, 1, 3)
    assert len(said) == 1
    assert "inputs [2], noise [1, 2, 2], 4 steps" in said[0]


@pytest.mark.parametrize(
    ("inputs", "noise", "steps"),
    [
        (torch.ones(3), torch.ones(1, 2, 2), 4),
        (torch.ones(2, dtype=torch.float64), torch.ones(1, 2, 2), 4),
        (torch.ones(2), torch.ones(5, 2, 2), 4),
        (torch.ones(2), torch.ones(1, 2, 2), 5),
    ],
    ids=["shape", "dtype", "chunks", "steps"],
)
def test_whatever_fixes_the_launches_is_captured_anew(
    inputs: Tensor, noise: Tensor, steps: int
) -> None:
    recorder = Recorder()
    graphs, said = make(recorder)
    graphs((torch.ones(2),), torch.ones(1, 2, 2), 4)
    assert torch.equal(graphs((inputs,), noise, steps), double((inputs,), noise, steps))
    assert recorder.captured == len(said) == 2


def test_inputs_are_copied_and_results_are_the_callers() -> None:
    graphs, _ = make(Recorder())
    given, noise = torch.ones(2), torch.ones(1, 2, 2)
    first = graphs((given,), noise, 3)
    kept = first.clone()
    given.fill_(100.0)
    second = graphs((torch.zeros(2),), noise, 3)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    first.numpy().fill(7.0)
    assert torch.equal(graphs((torch.zeros(2),), noise, 3), second)


def test_the_graph_longest_unused_goes_and_is_captured_again() -> None:
    recorder = Recorder()
    graphs, said = make(recorder, most=2)

    def call(width: int) -> None:
        graphs((torch.ones(width),), torch.ones(1, 2, 2), 1)

    for width in (1, 2, 1, 3):  # 2 goes
        call(width)
    assert recorder.captured == 3
    assert "2 graphs are kept" in said[2] and "kept" not in said[1]
    call(1)
    assert recorder.captured == 3
    call(2)
    assert recorder.captured == 4


def test_an_evicted_recording_is_let_go() -> None:
    graphs, _ = make(Recorder(), most=1, held=lambda _: None)
    graphs((torch.ones(1),), torch.ones(1, 2, 2), 1)
    (kept,) = graphs._graphs.values()
    assert kept.recording is not None
    old = weakref.ref(kept.recording)
    del kept
    graphs((torch.ones(2),), torch.ones(1, 2, 2), 1)
    gc.collect()
    assert old() is None


def test_no_graph_at_all_is_a_mistake() -> None:
    with pytest.raises(ResourceError, match="graph=False"):
        make(Recorder(), most=0)


@pytest.mark.parametrize(
    "failure",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("operation not permitted")],
)
def test_a_capture_that_fails_is_said_once_and_computed_launch_by_launch(
    failure: RuntimeError,
) -> None:
    recorder = Recorder(failure)
    graphs, said = make(recorder)
    for value in (1.0, 2.0):
        inputs, noise = (torch.full((2,), value),), torch.ones(1, 2, 2)
        assert torch.equal(graphs(inputs, noise, 2), double(inputs, noise, 2))
    assert recorder.captured == 1 and recorder.replayed == 0
    assert len(said) == 2
    assert str(failure) in said[1] and "launch by launch" in said[1]


def test_it_is_said_as_a_warning_unless_somebody_else_listens() -> None:
    graphs = ChunkGraphs(double, Recorder(), "cpu")
    with pytest.warns(GraphWarning, match="capturing"):
        graphs((torch.ones(2),), torch.ones(1, 2, 2), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs((torch.ones(2),), torch.ones(1, 2, 2), 2)


def test_errors_of_the_pass_are_the_callers_and_leave_no_graph() -> None:
    def refuse(*_: Any) -> Tensor:
        raise ObservationError("no")

    recorder = Recorder()
    graphs = ChunkGraphs(refuse, recorder, "cpu", say=lambda _: None)
    for _ in range(2):
        with pytest.raises(ObservationError):
            graphs((torch.ones(2),), torch.ones(1), 1)
    assert recorder.warmed == 2 and recorder.captured == 0


def test_threads_take_turns() -> None:
    graphs, _ = make(Recorder(), most=2)
    wrong: list[int] = []

    def work(value: int) -> None:
        for turn in range(40):
            inputs = (torch.full((1 + turn % 3,), float(value)),)
            noise = torch.full((1, 4, 4), float(turn))
            if not torch.equal(graphs(inputs, noise, 2), double(inputs, noise, 2)):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_launches_read_by_address_lives_as_long_as_the_graph(
    small_policy: NativePolicy, few: Observations
) -> None:
    """A linear may forget its scales and a policy its schedule; the graph that reads them not."""
    quantized = oq.quantize(small_policy, few).policy
    graphs = use_graphs(quantized, backend=Recorder(), most=1, say=lambda _: None)
    quantized.sample_actions(few[0], np.zeros(quantized.noise_shape, np.float32))
    linears = [m for m in quantized.module.modules() if isinstance(m, QuantizedLinear)]
    read = [weakref.ref(scale) for linear in linears for scale in linear.values_at_hand()]
    read.append(weakref.ref(quantized.schedule(quantized.steps)))
    assert len(read) > quantized.steps
    for linear in linears:
        linear._schedule._known.clear()
    quantized._schedules.clear()
    gc.collect()
    assert all(reference() is not None for reference in read)
    graphs._graphs.clear()
    gc.collect()
    assert all(reference() is None for reference in read)


@pytest.mark.parametrize("graph", [True, False])
def test_a_gpu_policy_is_loaded_with_graphs_unless_asked_not_to(
    graph: bool,
    small_policy: NativePolicy,
    few: Observations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The processor in the place of a GPU, a recorder in that of CUDA, PyTorch in Triton's."""
    recorder = Recorder()
    own = Elementwise if best_kernel() == REFERENCE else partial(CpuElementwise, best_kernel())
    monkeypatch.setattr(loading, "FusedElementwise", own)
    monkeypatch.setattr(gpu, "find", lambda _: gpu.Gpu("cpu", "None", (9, 0), 1, 1 << 40))
    monkeypatch.setattr(module, "CudaGraphs", lambda _: recorder)
    oq.quantize(small_policy, few, "rtn").save_pretrained(tmp_path / "out")
    noise = np.zeros(small_policy.noise_shape, np.float32)
    wanted = oq.load(tmp_path / "out").sample_actions(few[0], noise)
    loaded = oq.load(tmp_path / "out", device="cuda", graph=graph)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert np.array_equal(loaded.sample_actions(few[0], noise), wanted)
    assert recorder.captured == len(said) == int(graph)


class FakeCuda:
    """What of ``torch.cuda`` is called for a capture, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.pools: list[Any] = []
        self.current = SimpleNamespace(wait_stream=lambda _: self.calls.append("main waits"))
        monkeypatch.setattr(torch.cuda, "device", self.entered("device"))
        monkeypatch.setattr(torch.cuda, "stream", self.entered("side stream"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        side = SimpleNamespace(wait_stream=lambda _: self.calls.append("side waits"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new)

    def new(self) -> Any:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def entered(self, name: str) -> Callable[..., Any]:
        @contextmanager
        def enter(*_: Any) -> Iterator[None]:
            self.calls.append(name)
            yield

        return enter

    @contextmanager
    def graph(self, _: Any, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        self.calls.append("capture")
        yield


def test_cuda_warms_up_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def work() -> Tensor:
        cuda.calls.append("work")
        return torch.ones(1)

    graphs = module.CudaGraphs("cuda:0")
    graphs.warm_up(work)
    warmed = ["device", "side waits", "side stream", "work", "work", "main waits"]
    assert cuda.calls == warmed
    recording = graphs.capture(work)
    recording.replay()
    assert cuda.calls[len(warmed) :] == ["device", "capture", "work", "replay"]


def test_recordings_share_memory_while_any_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool of graphs that are all gone may be gone with them, so it is not asked for again."""
    cuda, graphs = FakeCuda(monkeypatch), module.CudaGraphs("cuda:0")
    first = graphs.capture(lambda: torch.ones(1))
    second = graphs.capture(lambda: torch.ones(1))
    del first
    third = graphs.capture(lambda: torch.ones(1))
    assert len(set(map(id, cuda.pools))) == 1
    del second, third
    gc.collect()
    graphs.capture(lambda: torch.ones(1))
    assert cuda.pools[-1] is not cuda.pools[0]
