"""Quantizing on a GPU: nothing is left on the wrong side, and the result is that of the CPU.

No GPU is needed.  A stand-in (``helpers/stand_in_device.py``) computes on the CPU and refuses
every operation that mixes its tensors with others.  Since it rounds as the CPU does, results must
be equal bit for bit; on a real GPU they differ by rounding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_device import DEVICE, GPU, MixedDevicesError, OnGpu, StandIn
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla import api, devices
from omega_qvla.calibration import capture
from omega_qvla.calibration.observations import Observations
from omega_qvla.devices import CPU, Gpu, find_gpu, full_float32
from omega_qvla.errors import PolicyError, ResourceError, ResumeError
from omega_qvla.policies.base import FlowClock, QuantizationSite, Stage
from omega_qvla.policies.loading import stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi05 import GemmaConfig
from omega_qvla.policies.pi05_policy import Pi05Policy
from omega_qvla.policies.placement import moved, on_device
from omega_qvla.policies.weight_store import hold
from omega_qvla.quantization import pipeline
from omega_qvla.quantization.gpu_memory import WORKSPACE, gpu_bytes
from omega_qvla.quantization.journal import HEADER
from omega_qvla.quantization.pipeline import quantize_policy
from omega_qvla.quantization.site import quantize_site
from omega_qvla.recipe import Recipe, Scheme, TransformScheme, WeightScheme

MakePolicy = Callable[..., Pi05Policy]
H200 = Gpu("cuda:0", "NVIDIA H200", (9, 0), 132, 141 << 30)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """``device="cuda"`` finds the stand-in; enter it to use it."""
    monkeypatch.setattr(api, "find_gpu", lambda _: GPU)
    return StandIn()


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_of(item)]
    if is_dataclass(value):
        return [x for field in fields(value) for x in tensors_of(getattr(value, field.name))]
    return []


def assert_same(found: Any, expected: Any) -> None:
    """Equal bit for bit, and all of it on the CPU."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.device == CPU and not isinstance(one, OnGpu)
        assert one.dtype == other.dtype and torch.equal(one, other)


def artifact_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


OFTEN = (
    ("small_policy", "omega-w4a4"),
    ("small_policy", "svdquant"),
    ("small_policy", "quantvla"),
    ("small_gr00t", "omega-w4a4"),
)
SELDOM = (
    ("small_policy", "omega-w4a4-cascade"),
    ("small_policy", "omega-w4a4-second-moment"),
    ("small_policy", "omega-w4a4-group-64"),
    ("small_policy", "omega-w4a4-step-or-token"),
    ("small_policy", "omega-paper"),
    ("small_policy", "duquant"),
    ("small_gr00t", "omega-w4a4-cascade"),
    ("small_gr00t", "quantvla"),
)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*OFTEN, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)],
)
def test_no_operation_mixes_devices_and_the_result_is_that_of_the_cpu(
    family: str, recipe: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    policy, chosen = request.getfixturevalue(family), Recipe.load(recipe)
    with StandIn() as device:
        found = quantize_policy(policy, few[:2], chosen, gpu=GPU)
    assert device.memory.peak > 0 and device.memory.held == 0
    assert_same(found, quantize_policy(policy, few[:2], chosen))
    assert all(tensor.device == CPU for tensor in policy.module.state_dict().values())


def test_the_artifact_has_the_bytes_of_one_made_on_the_cpu(
    small_policy: Pi05Policy, few: Observations, stand_in: StandIn, tmp_path: Path
) -> None:
    oq.quantize(small_policy, few).save_pretrained(tmp_path / "cpu")
    with stand_in:
        made = oq.quantize(small_policy, few, device="cuda", work_directory=tmp_path / "journal")
    made.save_pretrained(tmp_path / "gpu")
    assert artifact_bytes(tmp_path / "gpu") == artifact_bytes(tmp_path / "cpu")


class Store:
    """Parameters of a policy in memory, given out by name."""

    def __init__(self, policy: Pi05Policy) -> None:
        self.values = dict(policy.module.named_parameters())

    def read(self, name: str) -> Tensor:
        return self.values[name].detach().clone()


def streamed(policy: Pi05Policy) -> Pi05Policy:
    """The same policy without tensors, and where they are."""
    twin = Pi05Policy.skeleton(*policy.describe())
    twin.store = Store(policy)
    return twin


def test_a_streamed_policy_is_moved_stage_by_stage_and_gives_the_same_bytes(
    make_small: MakePolicy, few: Observations, stand_in: StandIn, tmp_path: Path
) -> None:
    policy = make_small()
    oq.quantize(policy, few).save_pretrained(tmp_path / "cpu")
    given = streamed(policy)
    with stand_in:
        made = oq.quantize(given, few, device="cuda", work_directory=tmp_path / "journal")
    made.save_pretrained(tmp_path / "gpu")
    assert artifact_bytes(tmp_path / "gpu") == artifact_bytes(tmp_path / "cpu")
    assert all(parameter.is_meta for parameter in given.module.parameters())


@pytest.mark.parametrize("recipe", ["omega-w4a4", "quantvla"])
def test_memory_stays_below_what_is_asked_for_beforehand(
    recipe: str, make_small: MakePolicy, few: Observations
) -> None:
    """One wide site beside small ones, so that what grows with K² shows; activations are small.

    The stand-in does not count what an operation allocates inside, which the workspace is for.
    """
    policy = make_small(backbone=GemmaConfig(width=64, hidden=720, heads=2, head_dim=32))
    chosen = Recipe.load(recipe)
    with StandIn() as device:
        quantize_policy(policy, few[:1], chosen, gpu=GPU)
    asked = gpu_bytes(policy, chosen) - WORKSPACE
    assert asked / 4 < device.memory.peak < asked


def test_memory_grows_neither_with_observations_nor_with_layers(
    make_small: MakePolicy, few: Observations
) -> None:
    """What a layer more adds is keys and values of one observation, a few kilobytes here."""
    wide, peaks = GemmaConfig(width=64, hidden=256, heads=2, head_dim=32), []
    for count, depth in ((1, 2), (4, 2), (1, 3)):
        policy = make_small(backbone=wide, depth=depth)
        many = Observations([few[i % 3] for i in range(count)])
        with StandIn() as device:
            quantize_policy(policy, many, Recipe.load("omega-w4a4"), gpu=GPU)
        peaks.append(device.memory.peak)
    # The widest site's sampled rows grow, to 1024; while some are added there are three copies.
    rows_of_one = 40
    assert peaks[1] - peaks[0] <= 3 * 3 * rows_of_one * 4 * 256 + 0.01 * peaks[0]
    assert peaks[2] <= 1.02 * peaks[0]


def test_full_size_pi05_is_said_to_fit_into_24_gigabytes() -> None:
    """From shapes; what it takes on a GPU was not measured."""
    policy = stream_policy("random:pi05")
    for recipe in ("omega-w4a4", "svdquant", "duquant", "quarot"):
        assert gpu_bytes(policy, Recipe.load(recipe)) < 24e9


# What the stand-in catches: each of these is a mistake that could have been made.


def test_statistics_forgotten_on_the_cpu_are_caught(
    small_policy: Pi05Policy, few: Observations, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = capture.SiteStatistics

    def forgetful(site: Any, width: int, generator: Any, _device: Any) -> Any:
        return original(site, width, generator)

    monkeypatch.setattr(capture, "SiteStatistics", forgetful)
    with StandIn(), pytest.raises(MixedDevicesError, match=r"addmm_.*\[64, 64\] on the CPU"):
        quantize_policy(small_policy, few, Recipe.load("omega-w4a4"), gpu=GPU)


def test_a_stage_that_does_not_name_what_it_reads_is_caught(
    small_policy: Pi05Policy, few: Observations, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = NativePolicy.clone

    def silent(policy: Any) -> Any:
        twin = original(policy)
        stages = [
            replace(stage, reads=()) if stage.name == "projector" else stage
            for stage in twin.stages()
        ]
        monkeypatch.setattr(twin, "stages", lambda: stages)
        return twin

    monkeypatch.setattr(small_policy, "clone", lambda: silent(small_policy))
    with StandIn(), pytest.raises(MixedDevicesError, match="on the CPU"):
        quantize_policy(small_policy, few, Recipe.load("rtn"), gpu=GPU)


def test_a_state_forgotten_on_the_cpu_is_caught(
    small_policy: Pi05Policy, few: Observations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "on_device", lambda stage, _device: stage)
    with StandIn(), pytest.raises(MixedDevicesError, match=r"convolution.*on the CPU"):
        quantize_policy(small_policy, few, Recipe.load("rtn"), gpu=GPU)


def test_a_result_forgotten_on_the_gpu_is_caught(
    small_policy: Pi05Policy, few: Observations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The journal digests bytes, which only the CPU has."""
    monkeypatch.setattr(pipeline, "moved", lambda value, _device: value)
    monkeypatch.setattr(api, "find_gpu", lambda _: GPU)
    with StandIn(), pytest.raises(TypeError, match="to numpy"):
        oq.quantize(small_policy, few, "rtn", device="cuda", work_directory=tmp_path / "work")


def test_the_stand_in_lets_scalars_pass_and_counts_views_once() -> None:
    with StandIn() as device:
        there = torch.arange(6.0).to(DEVICE)
        half = there[:3] * torch.tensor(0.5)
        with pytest.raises(MixedDevicesError, match=r"mul.*\[3\] on the CPU"):
            half * torch.ones(3)
        with pytest.raises(TypeError, match="to numpy"):
            half.numpy()
        assert half.cpu().tolist() == [0.0, 0.5, 1.0] and device.memory.held == 4 * (6 + 3)
        del half, there
    assert device.memory.held == 0


# The pieces.


def test_a_state_comes_back_to_the_cpu_and_what_was_only_passed_on_is_not_copied() -> None:
    seen: list[torch.device] = []

    def run(state: dict[str, Any]) -> dict[str, Any]:
        x, cache = state["x"], state["cache"]
        seen.extend([x.device, cache[0][0].device])
        return {**state, "x": x + 1, "cache": (*cache, (x * 2, x))}

    stage = Stage("one", run)
    assert on_device(stage, CPU) is stage
    x, key = torch.zeros(2), torch.ones(3)
    with StandIn():
        after = on_device(stage, DEVICE).run({"x": x, "cache": ((key, 5),), "steps": [x]})
    assert seen == [DEVICE, DEVICE]
    assert after["cache"][0][0] is key and after["cache"][0][1] == 5
    assert after["cache"][1][1] is x and after["steps"][0] is x
    assert_same([after["x"], after["cache"][1][0]], [torch.ones(2), torch.zeros(2)])


def test_held_modules_have_their_own_tensors_back_whatever_happens() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    before = {name: id(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
    with StandIn(), pytest.raises(KeyboardInterrupt), hold(module, None, ["0", "1"], DEVICE):
        held = dict((*module.named_parameters(), *module.named_buffers()))
        assert all(x.device == DEVICE for x in held.values()) and len(held) == 7
        assert isinstance(module[0].weight, nn.Parameter)
        raise KeyboardInterrupt
    after = {name: id(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
    assert after == before


@pytest.mark.parametrize("rotation", ["greedy", "second_moment"])
def test_fused_linears_of_which_one_has_a_bias_and_padding(rotation: Any) -> None:
    """What no policy of this project has: some biases missing, inputs that fill no block."""
    generator = torch.Generator().manual_seed(0)
    linears = [nn.Linear(40, 8), nn.Linear(40, 4, bias=False)]
    for linear in linears:
        for parameter in linear.parameters():
            parameter.requires_grad_(False).normal_(generator=generator)
    rows = torch.randn((70, 40), generator=generator)
    site = QuantizationSite("both", ("a", "b"), "backbone")
    scheme = Scheme(
        transform=TransformScheme(rotation=rotation, permutation="snake", block=16),
        weights=WeightScheme(low_rank=2),
    )

    def quantized(device: torch.device) -> Any:
        seeds = torch.Generator().manual_seed(0)
        statistics = capture.SiteStatistics(site, 40, seeds, device)
        statistics.update(rows.to(device), FlowClock(), 0)
        there = [_there(linear, device) for linear in linears]
        return moved(quantize_site(site, there, scheme, statistics), CPU)

    with StandIn():
        found = quantized(DEVICE)
    assert_same(found, quantized(CPU))


def _there(linear: nn.Linear, device: torch.device) -> nn.Linear:
    twin = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    twin.weight = nn.Parameter(linear.weight.to(device), requires_grad=False)
    if linear.bias is not None:
        twin.bias = nn.Parameter(linear.bias.to(device), requires_grad=False)
    return twin


def precision() -> list[Any]:
    return [getattr(owner, name) for owner, name, _ in devices._switches()]


def test_products_are_full_float32_on_a_gpu_and_switches_are_put_back(
    small_policy: Pi05Policy, few: Observations, stand_in: StandIn
) -> None:
    before, during = precision(), []

    def progress(*_: Any) -> None:
        during.append(precision())
        raise KeyboardInterrupt

    with stand_in, pytest.raises(KeyboardInterrupt):
        oq.quantize(small_policy, few, "rtn", device="cuda", progress=progress)
    exact = [value for _, _, value in devices._switches()]
    assert during == [exact] and before != exact and precision() == before
    with full_float32():
        assert precision() == exact
    with pytest.raises(KeyboardInterrupt):
        oq.quantize(small_policy, few, "rtn", progress=progress)
    assert during[1] == before


# Journals.


class StopError(Exception):
    """Raised in the middle of the work."""


def begin(policy: Pi05Policy, few: Observations, work: Path, device: str, sites: int = 4) -> None:
    def progress(done: int, _total: int, _what: str) -> None:
        if done == sites:
            raise StopError

    with pytest.raises(StopError):
        oq.quantize(policy, few, work_directory=work, progress=progress, device=device)


def test_work_on_a_gpu_resumes_there_to_the_same_bytes(
    small_policy: Pi05Policy, few: Observations, stand_in: StandIn, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with stand_in:
        begin(small_policy, few, work, "cuda")
        made = oq.quantize(small_policy, few, work_directory=work, resume=True, device="cuda")
    made.save_pretrained(tmp_path / "resumed")
    oq.quantize(small_policy, few).save_pretrained(tmp_path / "cpu")
    assert artifact_bytes(tmp_path / "resumed") == artifact_bytes(tmp_path / "cpu")


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_work_is_not_resumed_on_another_device(
    first: str,
    second: str,
    small_policy: Pi05Policy,
    few: Observations,
    stand_in: StandIn,
    tmp_path: Path,
) -> None:
    work, names = tmp_path / "work", {"cpu": "cpu", "cuda": r"NVIDIA Stand-in.*7\.5, CUDA"}
    with stand_in:
        begin(small_policy, few, work, first)
        message = rf"another device.*was '{names[first]}.*now '{names[second]}.*start again"
        with pytest.raises(ResumeError, match=message):
            oq.quantize(small_policy, few, work_directory=work, resume=True, device=second)


def test_work_is_not_resumed_on_a_gpu_of_another_kind_but_on_another_of_the_same(
    small_policy: Pi05Policy,
    few: Observations,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    with stand_in:
        begin(small_policy, few, work, "cuda")
        header = pipeline.journal_header(small_policy, "", "", Recipe.load("rtn"), GPU)
        assert header["device"] == replace(GPU, device="cuda:3", free_bytes=1).arithmetic
        other = replace(GPU, name="NVIDIA Other", capability=(8, 9))
        monkeypatch.setattr(api, "find_gpu", lambda _: other)
        with pytest.raises(ResumeError, match=r"Stand-in.*NVIDIA Other, compute capability 8\.9"):
            oq.quantize(small_policy, few, work_directory=work, resume=True, device="cuda")


def test_a_journal_from_before_devices_were_named_is_of_the_cpu(
    small_policy: Pi05Policy, few: Observations, stand_in: StandIn, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    begin(small_policy, few, work, "cpu")
    header = json.loads((work / HEADER).read_text("utf-8"))
    del header["device"]
    (work / HEADER).write_text(json.dumps(header), "utf-8")
    with stand_in, pytest.raises(ResumeError, match="was 'cpu', now 'NVIDIA"):
        oq.quantize(small_policy, few, work_directory=work, resume=True, device="cuda")
    oq.quantize(small_policy, few, work_directory=work, resume=True)


# What is refused.


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:first", ""])
def test_devices_there_are_not_are_refused_by_name(
    device: str, small_policy: Pi05Policy, few: Observations
) -> None:
    with pytest.raises(ResourceError, match=f"'{device}'.*'cuda:N'"):
        oq.quantize(small_policy, few, device=device)


def test_a_pytorch_without_cuda_is_named(
    monkeypatch: pytest.MonkeyPatch, small_policy: Pi05Policy, few: Observations
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ResourceError, match="built without CUDA"):
        oq.quantize(small_policy, few, device="cuda")


def test_neither_triton_nor_a_compute_capability_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those are what the integer kernels need, and quantizing does not run them."""
    properties = type("Properties", (), {"name": "NVIDIA Old", "major": 6, "minor": 1})
    properties.multi_processor_count = 20  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert find_gpu("cuda:1") == Gpu("cuda:1", "NVIDIA Old", (6, 1), 20, 3 << 30)
    with pytest.raises(ResourceError, match="sees 2 GPUs"):
        find_gpu("cuda:2")


def test_too_little_free_memory_is_refused_before_anything_is_read(
    small_policy: Pi05Policy,
    few: Observations,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(api, "find_gpu", lambda _: replace(H200, free_bytes=1 << 29))
    message = r"quantizing this pi05 policy with 'rtn' needs 1\.07 GB.*H200 has 0\.54 GB free"
    with pytest.raises(ResourceError, match=message):
        oq.quantize(small_policy, few, "rtn", device="cuda", work_directory=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_running_out_of_memory_says_so_and_what_was_done_is_kept(
    small_policy: Pi05Policy,
    few: Observations,
    stand_in: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    original, done = pipeline.quantize_site, []

    def full(*arguments: Any) -> Any:
        if len(done) == 3:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        done.append(arguments[0].name)
        return original(*arguments)

    work = tmp_path / "work"
    with stand_in, monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_site", full)
        with pytest.raises(ResourceError, match=r"'rtn': NVIDIA Stand-in ran out.*1 GiB"):
            oq.quantize(small_policy, few, "rtn", device="cuda", work_directory=work)
    assert len(list(work.glob("site-*.safetensors"))) == 3
    assert precision() != [value for _, _, value in devices._switches()]


def own_policy(module: nn.Module) -> oq.TorchPolicy:
    return oq.TorchPolicy(
        module,
        backbone="0",
        action_head=None,
        sample=lambda module, observation, noise, clock: module(
            torch.from_numpy(observation["state"])
        ),
    )


def test_a_module_of_the_users_own_is_quantized_on_the_cpu_only(
    few: Observations, stand_in: StandIn
) -> None:
    policy = own_policy(nn.Sequential(nn.Linear(4, 8)))
    with stand_in, pytest.raises(PolicyError, match=r"'cuda:0'.*module of your own"):
        oq.quantize(policy, few, "rtn", device="cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_policy_that_was_moved_by_hand_is_refused_by_the_tensors_name(
    device: str, make_small: MakePolicy, few: Sequence[Any], stand_in: StandIn
) -> None:
    policy = make_small()
    with stand_in:
        linear = policy.module.action_in_proj
        linear.weight = nn.Parameter(linear.weight.to(DEVICE), requires_grad=False)
        message = r"action_in_proj\.weight is on 'cuda:0'.*module\.to\('cpu'\)"
        with pytest.raises(PolicyError, match=message):
            oq.quantize(policy, few, "rtn", device=device)
