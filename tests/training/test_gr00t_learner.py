"""The loss a small GR00T N1.5 policy is trained with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module
from omega_qvla.training.dataset import Batch
from omega_qvla.training.gr00t_learner import Gr00tLearner

HORIZON, VOCABULARY = 10, 32


def batch(size: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCABULARY, (size, 5), generator=generator)
    lengths = torch.tensor([5, 3, 4][:size])
    tokens[torch.arange(5) >= lengths[:, None]] = 0
    return Batch(
        pixels=torch.randint(0, 256, (size, 2, 84, 84, 3), generator=generator, dtype=torch.uint8),
        tokens=tokens,
        lengths=lengths,
        state=torch.randn((size, 4), generator=generator),
        actions=torch.randn((size, HORIZON, 4), generator=generator),
        positions=torch.randn((size, 12), generator=generator),
        points=torch.rand((size, 2, 2, 2), generator=generator),
    )


def draws(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn((count, HORIZON, 4), generator=generator)
    return noise, torch.linspace(0.05, 0.95, count)


@pytest.fixture
def learner() -> Gr00tLearner:
    module = Gr00tN15Module(Gr00tN15Config.tiny(vocabulary=VOCABULARY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                spread = parameter.shape[-2 if parameter.ndim == 3 else -1] ** -0.5
                parameter.normal_(0.0, spread, generator=generator)
    return Gr00tLearner(module)


def test_padding_behind_a_prompt_changes_no_loss(learner: Gr00tLearner) -> None:
    noise, times = draws(6)
    padded = replace(batch(), tokens=torch.nn.functional.pad(batch().tokens, (0, 3), value=7))
    with torch.no_grad():
        ours, theirs = (learner.losses(b, noise, times) for b in (batch(), padded))
    for a, b in zip(ours, theirs, strict=True):
        # Only the order of summation inside attention differs.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_loss_is_zero_for_the_true_velocity(
    learner: Gr00tLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batch(2)
    noise, times = draws(4)
    actions = given.actions.repeat_interleave(2, dim=0)

    def true_velocity(x_t: Tensor, *_: object) -> Tensor:
        t = times[:, None, None]
        return (actions - x_t) / t  # x_t = t·noise + (1 - t)·a, so this is a - noise

    monkeypatch.setattr(learner.policy, "velocity", true_velocity)
    assert float(learner.losses(given, noise, times)[0].detach()) < 1e-6


def test_every_parameter_learns_and_the_loss_falls(learner: Gr00tLearner) -> None:
    given = batch()
    noise, times = draws(6)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3)
    curve: list[float] = []
    for _ in range(8):
        flow, position, point = learner.losses(given, noise, times)
        optimizer.zero_grad()
        (flow + position + 0.1 * point).backward()
        assert {n for n, p in learner.named_parameters() if p.grad is None} == set()
        optimizer.step()
        curve.append(float(flow.detach()))
    assert curve[-1] < 0.8 * curve[0]
