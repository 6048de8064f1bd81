"""LeRobot's own policies, shrunken and random, as ``TorchPolicy``: quantized, saved, loaded again.

The other process builds the policy from other random numbers, so everything that it computes with
comes out of the artifact.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lerobot_policies
import pytest
import torch
from torch import nn

import omega_qvla as oq
from omega_qvla.policies.guidance import Guidance
from omega_qvla.real_time_chunking import LeftOver, RealTimeChunking

SITES = {  # linears, and sites they make: those that read one tensor are one
    "pi0": (41, 25),
    "smolvla": (69, 45),
    "xvla": (53, 49),
    "multi_task_dit": (39, 31),
    "groot": (90, 71),
    "act": (6, 6),
}

ERROR = {
    "pi0": 0.06,
    "smolvla": 0.03,
    "xvla": 0.25,
    "multi_task_dit": 0.06,
    "groot": 0.03,
    "act": 0.06,
}
"""Largest root mean square of the actions' error over the actions' own.  Measured are about half
of these: they tell a policy from one that lost a layer, not a good recipe from a bad one."""

_LOAD = """
import sys, torch, omega_qvla as oq, lerobot_policies
name, directory = sys.argv[1:]
loaded = oq.load(directory, policy=lerobot_policies.torch_policy(name, seed=5))
generator = torch.Generator().manual_seed(3)
for number, batch in enumerate(lerobot_policies.batches(name)):
    chunk = loaded.sample_actions(batch, generator=generator)
    print(number, bytes(chunk.contiguous().view(-1).view(torch.uint8).tolist()).hex())
"""


@pytest.mark.parametrize("name", list(lerobot_policies.KINDS))
def test_a_policy_of_lerobot_quantized_saved_and_loaded_in_another_process(
    name: str, tmp_path: Path
) -> None:
    policy = lerobot_policies.torch_policy(name)
    observations = lerobot_policies.batches(name)
    generator = torch.Generator().manual_seed(3)
    exact = [policy.sample_actions(item, generator=generator) for item in observations]
    quantized = oq.quantize(policy, observations)
    linears = sum(len(site.site.linears) for site in quantized.sites)
    assert (linears, len(quantized.sites)) == SITES[name]
    generator = torch.Generator().manual_seed(3)
    ours = [quantized.sample_actions(item, generator=generator) for item in observations]
    error = torch.stack(ours) - torch.stack(exact)
    assert error.square().mean().sqrt() < ERROR[name] * torch.stack(exact).square().mean().sqrt()
    quantized.save_pretrained(tmp_path / "out")
    helpers = str(Path(lerobot_policies.__file__).parent)
    printed = subprocess.run(
        [sys.executable, "-c", _LOAD, name, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = [line.split() for line in printed.splitlines() if line[:1].isdigit()]
    for chunk, (_, text) in zip(ours, found, strict=True):
        assert bytes(chunk.contiguous().view(-1).view(torch.uint8).tolist()).hex() == text


def continuing(
    module: Any, observation: Any, noise: Any, clock: Any, left_over: Any, chunking: Any
) -> torch.Tensor:
    """LeRobot's own loop, told what to continue as its rollout tells it."""
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCConfig

    module.config.rtc_config = RTCConfig(
        prefix_attention_schedule=RTCAttentionSchedule[chunking.schedule.upper()],
        max_guidance_weight=chunking.max_guidance_weight,
        execution_horizon=chunking.execution_horizon,
    )
    module.init_rtc_processor()
    previous = None if left_over is None else torch.from_numpy(left_over.actions)
    delay = 0 if left_over is None else left_over.delay
    batch = {name: tensor.clone() for name, tensor in observation.items()}
    return module.predict_action_chunk(
        batch, noise=noise, inference_delay=delay, prev_chunk_left_over=previous
    )


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_a_policy_of_lerobot_continues_a_chunk_on_integers_by_the_closed_form(name: str) -> None:
    """Every step from noise to chunk, with the velocities that the integers gave."""
    policy = lerobot_policies.torch_policy(name)
    policy.sample = continuing
    observations = lerobot_policies.batches(name)
    quantized = oq.quantize(policy, observations)
    start = torch.randn(quantized.noise_shape, generator=torch.Generator().manual_seed(3))
    before = quantized.sample_actions(observations[0], -start)[0, 2:]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = quantized.policy.module.model
    step = model.denoise_step

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        velocity = step(*args, **kwargs)
        seen.append((kwargs["x_t"].detach().clone(), velocity.detach().clone()))
        return velocity

    model.denoise_step = watched
    settings = RealTimeChunking(execution_horizon=6, max_guidance_weight=4.0, schedule="exp")
    chunk = quantized.sample_actions(
        observations[1], start, previous=before, delay=2, chunking=settings
    )
    left_over = LeftOver(before.numpy(), 2)
    guidance = Guidance.to(left_over, settings, tuple(start.shape[1:]))
    steps = len(seen)
    assert steps == quantized.steps
    for number, (x, velocity) in enumerate(seen):
        t = 1.0 - number / steps
        x = x - (velocity - guidance.correction(x - t * velocity, t)) / steps
        after = seen[number + 1][0] if number + 1 < steps else chunk
        torch.testing.assert_close(after, x[..., : after.shape[-1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [r".*base_layer", r".*"])
def test_an_unmerged_lora_of_peft_keeps_its_branch(pattern: str, tmp_path: Path) -> None:
    """PEFT's layer is no nn.Linear but holds three: the base, and the two of its branch."""
    peft = pytest.importorskip("peft")

    def made(seed: int) -> oq.TorchPolicy:
        network = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))
        config = peft.LoraConfig(r=4, target_modules=["0", "2"], lora_alpha=32)
        module = peft.get_peft_model(network, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.data.normal_(0.0, 0.3, generator=generator)
        return oq.TorchPolicy(
            module, backbone=pattern, sample=lambda module, x, _noise, _clock: module(x["x"])
        )

    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(16, 32, generator=generator)} for _ in range(4)]
    policy = made(0)
    exact = policy.clone().sample_actions(data[0])
    without = made(0).clone()
    for name, parameter in without.module.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.zeros_like(parameter)
    lost = (without.sample_actions(data[0]) - exact).square().mean()
    quantized = oq.quantize(policy, data)
    error = (quantized.sample_actions(data[0]) - exact).square().mean()
    assert error < 0.25 * lost  # a branch of rank four in four bits; without it, 1
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=made(1))
    for item in data:
        assert torch.equal(loaded.sample_actions(item), quantized.sample_actions(item))
