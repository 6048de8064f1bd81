"""Quantizing on a GPU: nothing is left on the wrong side, and the result is that of the CPU.

No GPU is needed.  A stand-in (``helpers/stand_in_device.py``) computes on the CPU and refuses
every operation that mixes its tensors with others.  Since it rounds as the CPU does, results must
be equal bit for bit; on a real GPU they differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_device import (
    DEVICE,
    GPU,
    MixedDevicesError,
    OnGpu,
    StandIn,
    artifact_bytes,
    precision,
)
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla import api, devices
from omega_qvla.calibration import capture
from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.weight_store import weights_on
from omega_qvla.devices import CPU, Gpu, full_float32
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite, Stage
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.placement import moved, on_device
from omega_qvla.quantization import pipeline
from omega_qvla.quantization.gpu_memory import WORKSPACE, gpu_bytes
from omega_qvla.quantization.pipeline import quantize_policy
from omega_qvla.quantization.site import quantize_site
from omega_qvla.recipe import Recipe, Scheme, TransformScheme, WeightScheme

pytestmark = pytest.mark.emulated

MakePolicy = Callable[..., Pi05Policy]
H200 = Gpu("cuda:0", "NVIDIA H200", (9, 0), 132, 141 << 30)


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


OFTEN = (
    ("small_policy", "omega-w4a4-static"),
    ("small_policy", "svdquant"),
    ("small_policy", "quantvla"),
    ("small_gr00t", "omega-w4a4-static"),
)
SELDOM = (
    ("small_policy", "omega-w4a4-static-cascade"),
    ("small_policy", "omega-w4a4-static-second-moment"),
    ("small_policy", "omega-w4a4-static-group-64"),
    ("small_policy", "omega-w4a4-static-step-or-token"),
    ("small_policy", "omega-paper"),
    ("small_policy", "duquant"),
    ("small_gr00t", "omega-w4a4-static-cascade"),
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


@pytest.mark.parametrize("recipe", ["omega-w4a4-static", "quantvla"])
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
            quantize_policy(policy, many, Recipe.load("omega-w4a4-static"), gpu=GPU)
        peaks.append(device.memory.peak)
    # The widest site's sampled rows grow, to 1024; while some are added there are three copies.
    rows_of_one = 40
    assert peaks[1] - peaks[0] <= 3 * 3 * rows_of_one * 4 * 256 + 0.01 * peaks[0]
    assert peaks[2] <= 1.02 * peaks[0]


def test_full_size_pi05_is_said_to_fit_into_24_gigabytes() -> None:
    """From shapes; what it takes on a GPU was not measured."""
    policy = stream_policy("random:pi05")
    for recipe in ("omega-w4a4-static", "svdquant", "duquant", "quarot"):
        assert gpu_bytes(policy, Recipe.load(recipe)) < 24e9


# What the stand-in catches: each of these is a mistake that could have been made.


def test_statistics_forgotten_on_the_cpu_are_caught(
    small_policy: Pi05Policy, few: Observations, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = capture.SiteStatistics

    def forgetful(site: Any, width: int, generator: Any, _device: Any, *others: Any) -> Any:
        return original(site, width, generator, CPU, *others)

    monkeypatch.setattr(capture, "SiteStatistics", forgetful)
    with StandIn(), pytest.raises(MixedDevicesError, match=r"addmm_.*\[64, 64\] on the CPU"):
        quantize_policy(small_policy, few, Recipe.load("omega-w4a4-static"), gpu=GPU)


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
    with StandIn(), pytest.raises(KeyboardInterrupt), weights_on(module, None, ["0", "1"], DEVICE):
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
