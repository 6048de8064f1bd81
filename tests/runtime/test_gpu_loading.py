"""What is refused before a GPU is touched, and that nothing of a policy stays on the CPU.

No GPU is needed: what PyTorch says of one is put in its place, and PyTorch's device without memory
(``meta``) stands for a GPU where tensors of two devices would meet.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import omega_qvla as oq
from omega_qvla.artifact.packing import pack_int4
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.elementwise import ElementwiseModule
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime import load as loading
from omega_qvla.runtime.fused import FusedElementwise
from omega_qvla.runtime.kernels import triton_gpu as gpu
from omega_qvla.runtime.linear import GpuRun, QuantizedLinear

H200 = gpu.Gpu("cuda:0", "NVIDIA H200", (9, 0), 132, 141 << 30)


def pretend(monkeypatch: pytest.MonkeyPatch, count: int = 1, capability: Any = (9, 0)) -> None:
    """Let PyTorch say that it has GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 30, 16 << 30))
    properties = SimpleNamespace(
        name="NVIDIA Something",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=46,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:first", "cuda:-1", ""])
def test_devices_there_are_not_are_refused_by_name(device: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"'{device}'.*'cuda:N'"):
        oq.load(tmp_path, device=device)


def test_a_pytorch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ResourceError, match="built without CUDA"):
        oq.load(tmp_path, device="cuda")


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:1", 1)])
def test_no_gpu_of_that_number(monkeypatch: pytest.MonkeyPatch, device: str, count: int) -> None:
    pretend(monkeypatch, count)
    with pytest.raises(ResourceError, match=f"sees {count} GPUs"):
        gpu.find(device)


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ResourceError, match=r"pip install 'triton>="):
        gpu.find("cuda")


def test_an_old_gpu_is_refused_with_what_it_has_and_what_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, capability=(7, 5))
    monkeypatch.setattr(gpu, "programs", lambda: None)
    with pytest.raises(ResourceError, match=r"7\.5; the kernels need 8\.0"):
        gpu.find("cuda:0")


def test_a_gpu_that_will_do_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability=(8, 7))
    monkeypatch.setattr(gpu, "programs", lambda: None)
    assert gpu.find("cuda") == gpu.Gpu("cuda:0", "NVIDIA Something", (8, 7), 46, 8 << 30)


@pytest.fixture
def artifact(small_policy: NativePolicy, few: Observations, tmp_path: Path) -> Path:
    oq.quantize(small_policy, few, "rtn").save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_too_little_memory_is_refused_before_anything_is_moved(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = gpu.Gpu("cuda:0", "NVIDIA Small", (8, 0), 20, 1 << 29)
    monkeypatch.setattr(gpu, "find", lambda _: small)
    with pytest.raises(ResourceError, match=r"needs 1\.07 GB of GPU memory.*0\.54 GB free"):
        oq.load(artifact, device="cuda")


def test_a_folder_for_tilings_without_a_gpu_is_a_mistake(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="tuning is for GPUs"):
        oq.load(artifact, tuning=tmp_path)


def test_a_module_of_the_users_own_stays_on_the_cpu(
    few: Observations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = oq.TorchPolicy(
        nn.Sequential(nn.Linear(4, 8)),
        backbone="0",
        action_head=None,
        sample=lambda module, observation, noise, clock: module(
            torch.from_numpy(observation["state"])
        ),
        steps=1,
    )
    oq.quantize(policy, few, "rtn").save_pretrained(tmp_path / "own")
    monkeypatch.setattr(gpu, "find", lambda _: H200)
    with pytest.raises(PolicyError, match="module of your own"):
        oq.load(tmp_path / "own", device="cuda", policy=policy)


def test_memory_counts_every_tensor_once_and_widened_ones_twice(artifact: Path) -> None:
    from omega_qvla.artifact.directory import read_artifact

    found = read_artifact(artifact)
    names = {site["name"] for site in found.config["sites"]}
    wide = sum(
        tensor.nbytes
        for name, tensor in found.tensors.items()
        if tensor.dtype == torch.bfloat16 and name.rpartition(".")[0] not in names
    )
    embedding = found.config["embedding"]
    if embedding is not None:
        scale = found.tensors[f"{embedding['path']}.weight_scale"]
        wide -= scale.nbytes if scale.dtype == torch.bfloat16 else 0
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    assert loading._gpu_bytes(found) == loading.GPU_WORKSPACE + total + wide


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def make(kernel: str | None = None, **changes: Any) -> QuantizedLinear:
    weight = torch.ones((6, 64), dtype=torch.int8)
    arguments: dict[str, Any] = {
        "weight_packed": pack_int4(weight).as_subclass(OnGpu),
        "weight_scale": torch.ones(6),
        "in_features": 64,
        "splits": (6,),
        "activation_bits": 4,
        "transform": None,
        "permutation": None,
        "activation_scale": None,
        "activation_step_times": None,
        "bias": None,
        "group": None,
        "clock": FlowClock(),
        "kernel": kernel,
        "gpu": GpuRun(H200),
    }
    return QuantizedLinear(**(arguments | changes))


@pytest.mark.parametrize("kernel", [None, "triton"])
def test_layers_on_a_gpu_take_its_kernel(kernel: str | None) -> None:
    assert make(kernel).kernel == "triton"


@pytest.mark.parametrize("kernel", ["reference", "avx2"])
def test_kernels_of_the_processor_are_refused_on_a_gpu(kernel: str) -> None:
    with pytest.raises(PolicyError, match="on a GPU"):
        make(kernel)


def test_the_gpu_kernel_is_refused_on_the_processor() -> None:
    with pytest.raises(PolicyError, match="'triton' runs on a GPU"):
        make("triton", weight_packed=pack_int4(torch.ones((6, 64), dtype=torch.int8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 32, "weight_scale": torch.ones((6, 2))}, "per 32 inputs"),
        ({"activation_bits": 6}, "6 bits"),
        ({"transform": torch.ones(2, 32, 32).bfloat16()}, "blocks of 32"),
        ({"permutation": torch.arange(64, dtype=torch.int32)}, "permutes"),
        (
            {"weight_packed": torch.ones((6, 64), dtype=torch.int8).as_subclass(OnGpu)},
            "8 bits, not 4",
        ),
    ],
)
def test_layers_the_gpu_kernel_cannot_do_are_refused_with_the_reason(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        make(**changes)


def test_gates_are_the_end_of_a_product_where_they_can_be() -> None:
    assert make(splits=(3, 3)).can_gate()
    assert not make(splits=(6,)).can_gate() and not make(splits=(2, 4)).can_gate()
    assert not make(splits=(3, 3), group=64, weight_scale=torch.ones((6, 1))).can_gate()
    branch = {
        "low_rank_down": torch.zeros((1, 64), dtype=torch.bfloat16),
        "low_rank_up": torch.zeros((6, 1), dtype=torch.bfloat16),
    }
    assert not make(splits=(3, 3), **branch).can_gate()


class Asked(QuantizedLinear):
    """Says what it was asked for."""

    def gated(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        raise LookupError(kind)


def test_layers_ask_for_such_an_end() -> None:
    linear = make(splits=(3, 3))
    linear.__class__ = Asked
    with pytest.raises(LookupError, match="silu"):
        FusedElementwise().gated_linears("silu", torch.zeros((1, 64)), linear, None)


def test_loading_on_a_gpu_fuses_what_is_between_the_linears(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor stands for the GPU: where tensors go is another test's affair."""
    monkeypatch.setattr(loading, "_gpu_run", lambda *_: GpuRun(replace(H200, device="cpu")))
    layers = [
        child
        for child in oq.load(artifact, device="cuda", graph=False).policy.module.modules()
        if isinstance(child, ElementwiseModule)
    ]
    assert layers and all(isinstance(one.elementwise, FusedElementwise) for one in layers)
    layers = list(oq.load(artifact).policy.module.modules())
    assert not any(
        isinstance(getattr(one, "elementwise", None), FusedElementwise) for one in layers
    )


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_a_policy_computes_where_its_network_is(
    family: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    """Had any tensor stayed on the CPU, one of these operations would refuse to mix devices."""
    policy = request.getfixturevalue(family).clone()
    policy.module.to("meta")
    assert policy.device.type == "meta"
    with torch.inference_mode():
        observed = policy.read(policy.see(few[0]))
        noise = policy._noise(None, torch.Generator())
        chunk = policy.denoise(observed, noise, policy.steps)
    assert chunk.device.type == "meta" and chunk.shape == (1, *policy.noise_shape)
