"""Training: the flow-matching loss, batches, resuming and mismatched instructions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.pi05.network import Pi05Module
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.training.dataset import TrainingSet, load_demonstrations
from omega_qvla.training.demonstrations import CAMERAS, HORIZON, Demonstrations
from omega_qvla.training.families import FAMILIES, fit_quantiles, fit_range
from omega_qvla.training.learner import patch_weights
from omega_qvla.training.pi05_learner import Pi05Learner, initialize_pi05
from omega_qvla.training.run import train_policy
from omega_qvla.training.train import Trainer, TrainingPlan, learning_rate

pytestmark = pytest.mark.long

TASKS = ("faucet-open-v3", "faucet-close-v3", "door-open-v3")
PI05 = FAMILIES[Pi05Policy.family]
PLAN = TrainingPlan(steps=4, batch=4, noise_samples=2, warmup=2, half=False, compiled=False)


def demonstrations(task: str, count: int = 6) -> Demonstrations:
    generator = np.random.default_rng(len(task))
    return Demonstrations(
        task=task,
        images={c: generator.integers(0, 256, (count, 84, 84, 3), dtype=np.uint8) for c in CAMERAS},
        state=generator.normal(size=(count, 4)).astype(np.float32),
        actions=generator.uniform(-1, 1, (count, HORIZON, 4)).astype(np.float32),
        positions=generator.normal(size=(count, 6)).astype(np.float32),
        episode=np.arange(count, dtype=np.int32),
    )


@pytest.fixture(scope="module")
def data() -> TrainingSet:
    sets = [demonstrations(task) for task in TASKS]
    return TrainingSet(sets, PI05.processor(sets), PI05.text, mismatch=0.0, shares={})


def initialized(data: TrainingSet) -> Pi05Module:
    module = Pi05Module(data.processor.config)
    initialize_pi05(module, data.processor.tokenizer, 0)
    return module


def test_demonstrations_survive_a_round_trip_and_later_rounds_are_added(tmp_path: Path):
    first = demonstrations("door-open-v3")
    first.save(tmp_path / "door-open-v3.npz")
    first.save(tmp_path / "door-open-v3.1.npz")
    (loaded,) = load_demonstrations(tmp_path, ["door-open-v3"])
    assert len(loaded) == 2 * len(first)
    assert len(np.unique(loaded.episode)) == 2 * len(np.unique(first.episode))
    np.testing.assert_array_equal(loaded.images["wrist"][6:], first.images["wrist"])


def test_a_constant_dimension_does_not_blow_up_when_normalized():
    for fit in (fit_quantiles, fit_range):
        fitted = fit(np.zeros((100, 1)), 0.5)
        assert fitted.normalize(np.array([0.01], np.float32)) == pytest.approx(0.04, abs=1e-5)


def test_minima_and_maxima_are_mapped_to_one():
    values = np.array([[0.0, -3.0], [2.0, 5.0], [1.0, 0.0]], np.float32)
    normalized = fit_range(values, 0.05).normalize(values)
    np.testing.assert_allclose(normalized, [[-1, -1], [1, 1], [0, -0.25]], atol=1e-6)


def test_shorter_prompts_are_padded_and_the_padding_changes_nothing(data: TrainingSet):
    learner = Pi05Learner(initialized(data)).eval()
    batch = data.batch(4, torch.Generator().manual_seed(1))
    noise = torch.randn(4, HORIZON, 4, generator=torch.Generator().manual_seed(2))
    times = torch.full((4,), 0.4)
    padded = torch.cat((batch.tokens, torch.full((4, 3), 5)), dim=1)
    longer = replace(batch, tokens=padded)
    with torch.no_grad():
        ours, theirs = learner.losses(batch, noise, times), learner.losses(longer, noise, times)
    # Only the order of summation inside attention differs.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_the_loss_is_zero_for_the_true_velocity(data: TrainingSet, monkeypatch):
    learner = Pi05Learner(initialized(data)).eval()
    batch = data.batch(2, torch.Generator().manual_seed(1))
    noise = torch.randn(4, HORIZON, 4, generator=torch.Generator().manual_seed(2))
    times = torch.tensor([0.2, 0.9, 0.5, 0.01])
    actions = batch.actions.repeat_interleave(2, dim=0)

    def true_velocity(x_t, *_):
        t = times[:, None, None]
        return (x_t - actions) / t  # x_t = t·noise + (1 - t)·a, so this is noise - a

    monkeypatch.setattr(learner.policy, "velocity", true_velocity)
    assert float(learner.losses(batch, noise, times)[0].detach()) < 1e-6


def test_a_mismatched_instruction_comes_from_another_scene_and_means_hold_still():
    sets = [demonstrations(task) for task in TASKS]
    processor = PI05.processor(sets)
    always = TrainingSet(sets, processor, PI05.text, mismatch=1.0, shares={})
    batch = always.batch(64, torch.Generator().manual_seed(0))
    still = processor.statistics.actions.normalize(np.zeros(4, np.float32))[:3]
    np.testing.assert_allclose(batch.actions[..., :3], np.broadcast_to(still, (64, HORIZON, 3)))
    # A faucet is never told to be turned the other way: only the door's words, and for the door
    # the faucets', can appear. Its prompts are one word shorter.
    door = processor.tokenizer.encode("open the door")
    told_door = torch.tensor(
        [len(set(door) & set(row.tolist())) == len(door) for row in batch.tokens]
    )
    pixels = torch.from_numpy(sets[2].images["base"])
    is_door = torch.tensor([bool((pixels == p[0]).flatten(1).all(1).any()) for p in batch.pixels])
    assert bool((told_door != is_door).all())


def test_a_point_is_shared_among_the_patches_around_it():
    points = torch.tensor([[0.25, 0.25], [0.5, 0.25], [1.2, 0.5]])
    weights = patch_weights(points, grid=2)
    # Right, then down: the first lies on the first patch's centre, the second between two patches.
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0] * 4])
    torch.testing.assert_close(weights, expected)


def test_the_learning_rate_warms_up_and_ends_at_two_percent():
    plan = TrainingPlan(steps=100, warmup=10)
    assert learning_rate(plan, 0) == pytest.approx(plan.learning_rate / 10)
    assert learning_rate(plan, 10) == pytest.approx(plan.learning_rate)
    assert learning_rate(plan, 100) == pytest.approx(0.02 * plan.learning_rate)


def test_neighbouring_state_bins_start_as_neighbours(data: TrainingSet):
    module, tokenizer = initialized(data), data.processor.tokenizer
    row = {
        v: module.embed_tokens.weight[tokenizer.vocabulary.index(str(v))] for v in (100, 101, 180)
    }
    near, far = (row[100] - row[101]).norm(), (row[100] - row[180]).norm()
    assert near < 0.5 * far


def test_an_interrupted_run_continues_as_if_it_had_not_been(data: TrainingSet, tmp_path: Path):
    whole = Trainer(PI05, data, PLAN, tmp_path / "whole")
    for _ in range(4):
        whole.train_step()
    first = Trainer(PI05, data, PLAN, tmp_path / "parts")
    for _ in range(2):
        first.train_step()
    first.save()
    second = Trainer(PI05, data, PLAN, tmp_path / "parts")
    assert second.step == 2
    for _ in range(2):
        second.train_step()
    for name, value in whole.average.items():
        torch.testing.assert_close(value, second.average[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", [Pi05Policy.family, Gr00tN15Policy.family])
def test_training_writes_a_policy_that_loads_and_acts(family: str, tmp_path: Path):
    for task in TASKS:
        demonstrations(task).save(tmp_path / f"{task}.npz")
    trained = train_policy(
        FAMILIES[family], tmp_path, TASKS, PLAN, tmp_path / "policy", lambda point: None
    )
    policy = load_policy(tmp_path / "policy")
    assert policy.family == family
    for name, value in trained.module.state_dict().items():
        torch.testing.assert_close(
            policy.module.state_dict()[name], value.bfloat16().float(), rtol=0, atol=0
        )
    observation = {
        "images": {c: np.zeros((84, 84, 3), np.uint8) for c in CAMERAS},
        "state": np.zeros(4, np.float32),
        "prompt": "open the door",
    }
    chunk = policy.sample_actions(observation, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (HORIZON, 4) and np.isfinite(chunk).all()
