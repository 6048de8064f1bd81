"""The roofline is arithmetic: its counts have oracles, and it agrees with what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.cli import main
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.chunk_reads import chunk_reads
from omega_qvla.evaluation.speed.device_roofline import (
    DEVICES,
    PARTS,
    artifact_structure,
    bytes_read,
    count,
    in_bf16,
    predicted,
    roofline,
    roofline_row,
)
from omega_qvla.evaluation.speed.policy_speed import held_tensors
from omega_qvla.policies.native import NativePolicy
from omega_qvla.recipe import Recipe

pytestmark = pytest.mark.long

FAMILIES = ("small_policy", "small_gr00t")


def structure(policy: NativePolicy) -> NativePolicy:
    copy = policy.clone()
    copy.module.to("meta")
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_multiply_adds_are_those_that_pytorch_counts(
    family: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    """PyTorch counts two operations per multiply-add, below the functions that are counted here."""
    policy = structure(request.getfixturevalue(family))
    policy.schedule(policy.steps)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        observed = policy.prefill(policy.encode_images(policy.processor.encode(few[0])))
        noise = torch.zeros((1, *policy.noise_shape), device="meta")
        policy.denoise(observed, noise, policy.steps)
    counted = count(policy, few[0])
    total = sum(sum(part.linears.values()) + part.others for part in counted.values())
    assert 2 * total == counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_reads_the_bytes_that_its_runtime_reads(
    family: str, request: pytest.FixtureRequest, few: Observations, tmp_path: Path
) -> None:
    """Against the policy benchmark: vectors it holds as float32 are stored in 16 bits."""
    policy = request.getfixturevalue(family)
    quantized = oq.quantize(policy, few, "omega-w4a4-static")
    quantized.save_pretrained(tmp_path / "out")
    found, stored = artifact_structure(tmp_path / "out")
    ours = sum(bytes_read(found, stored, count(found, few[0])).values())
    loaded = oq.load(tmp_path / "out", kernel="reference").policy
    assert isinstance(loaded, NativePolicy)
    times, _ = chunk_reads(loaded, few[0])
    theirs = sum(
        times[path] * tensor.nbytes
        for path, child in loaded.module.named_modules()
        for tensor in held_tensors(child)
    )
    assert 0.6 * theirs < ours < 1.2 * theirs


@pytest.mark.parametrize("recipe", ["rtn", "omega-w4a4-static", "omega-w4a4-no-prior"])
@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_bytes_are_those_that_a_call_then_reads(
    family: str, recipe: str, request: pytest.FixtureRequest, few: Observations, tmp_path: Path
) -> None:
    policy = request.getfixturevalue(family)
    oq.quantize(policy, few, recipe).save_pretrained(tmp_path / "out")
    _, stored = artifact_structure(tmp_path / "out")
    expected = predicted(structure(policy), Recipe.load(recipe))
    assert stored.quantized == expected.quantized
    for path in stored.quantized & stored.held.keys():
        assert stored.held[path] == expected.held[path], path


def test_a_part_is_bound_by_memory_or_by_arithmetic_whichever_is_slower(
    small_policy: NativePolicy, few: Observations
) -> None:
    policy = structure(small_policy)
    counted, stored = count(policy, few[0]), in_bf16(policy)
    device = DEVICES["orin"]
    row = roofline_row("x", device, policy, stored, counted)
    read = bytes_read(policy, stored, counted)
    for part in PARTS:
        macs = sum(counted[part].linears.values()) + counted[part].others
        memory = read[part] / (device.memory_gbytes * 1e9)
        compute = 2 * macs / (device.bf16_tflops * 1e12)
        assert row[f"{part}_ms"] == pytest.approx(1e3 * max(memory, compute))
        assert row["bound_by"][part] == ("memory" if memory > compute else "compute")
    assert row["total_ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in PARTS))
    assert row["integer_gmacs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "bf16", "w4a4"),
    [("orin", 95, 45), ("thor", 40, 13), ("4090", 23, 6), ("h200", 4.1, 1.9)],
)
def test_full_size_pi05_agrees_with_figures_worked_out_by_hand(
    device: str, bf16: float, w4a4: float
) -> None:
    """An earlier estimate, per chunk with 2 cameras and horizon 10; its figures are rounded."""
    full, quantized = roofline(device, policy="random:pi05-libero")["rows"]
    assert full["total_ms"] == pytest.approx(bf16, rel=0.12)
    assert quantized["total_ms"] == pytest.approx(w4a4, rel=0.12)


def test_the_command_says_that_it_calculates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "roofline.json"
    arguments = ["bench", "policy", "--policy", "random:tiny-pi05", "--roofline", "orin"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--json", str(target)])
    assert stop.value.code == 0
    assert "a calculation, not a measurement" in capsys.readouterr().out
    document = json.loads(target.read_text())
    assert document["calculation"] is True and document["device"]["key"] == "orin"
    assert [row["precision"] for row in document["rows"]] == ["bf16", "w4a4"]
    assert document["rows"][1]["weight_bytes_read"] < document["rows"][0]["weight_bytes_read"]


def test_kernels_have_no_roofline_of_a_device_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "kernels", "--roofline", "h200"])
    assert stop.value.code == 2
    assert "--roofline would do nothing" in capsys.readouterr().err


def test_a_module_of_the_users_own_has_no_roofline(few: Observations, tmp_path: Path) -> None:
    policy = oq.TorchPolicy(
        torch.nn.Sequential(torch.nn.Linear(4, 8)),
        backbone="0",
        action_head=None,
        sample=lambda module, observation, noise, clock: module(
            torch.from_numpy(observation["state"])
        ),
        steps=1,
    )
    oq.quantize(policy, few, "rtn").save_pretrained(tmp_path / "own")
    with pytest.raises(PolicyError, match="module of your own"):
        artifact_structure(tmp_path / "own")
