"""Quantizing on a GPU: interrupted work, devices that are not there, too little memory.

With the stand-in of ``test_gpu_quantizing.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in_device import DEVICE, GPU, StandIn, artifact_bytes, precision
from torch import nn

import omega_qvla as oq
from omega_qvla import api, devices
from omega_qvla.calibration.observations import Observations
from omega_qvla.devices import Gpu, find_gpu
from omega_qvla.errors import PolicyError, ResourceError, ResumeError
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization import pipeline
from omega_qvla.quantization.journal import HEADER
from omega_qvla.recipe import Recipe

pytestmark = pytest.mark.emulated

MakePolicy = Callable[..., Pi05Policy]
H200 = Gpu("cuda:0", "NVIDIA H200", (9, 0), 132, 141 << 30)


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
