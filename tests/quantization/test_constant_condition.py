"""A head whose condition was constant in calibration, and moves afterwards; outlier channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.calibration.capture import SiteStatistics
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.simulation import SimulatedLinear
from omega_qvla.quantization.site import needs_statistics, quantize_site
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe

ACTIONS, STEPS = (10, 16), 4


class Head(nn.Module):
    """Noisy actions beside a condition vector, which also enters by a linear of its own."""

    def __init__(self, condition: int) -> None:
        super().__init__()
        self.into = nn.Linear(ACTIONS[1] + condition, 128)
        self.middle = nn.Linear(128, 128)
        self.conditioned = nn.Linear(condition, 128)
        self.out = nn.Linear(128, ACTIONS[1])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for linear in (self.into, self.middle, self.conditioned, self.out):
                linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
                linear.bias.normal_(std=0.1, generator=generator)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        both = torch.cat([x, condition.expand(x.shape[0], -1)], dim=-1)
        hidden = self.middle(torch.nn.functional.silu(self.into(both)))
        return self.out(torch.nn.functional.silu(hidden + self.conditioned(condition)))


def sample(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    x = noise
    for step in range(STEPS):
        with clock.step(step, 1 - step / STEPS):
            x = x - module(x, observation["condition"]) / STEPS
    return x


def error(recipe: str, shown: Tensor, later: Tensor) -> float:
    """Relative squared error of the chunk with ``later`` as condition, calibrated on ``shown``."""
    head = Head(shown.shape[-1])
    policy = TorchPolicy(head, sample=sample, steps=STEPS, action_head=".*", noise_shape=ACTIONS)
    quantized: Any = oq.quantize(policy, [{"condition": row[None]} for row in shown], recipe)
    wrong, whole = 0.0, 0.0
    for number, row in enumerate(later):
        noise = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(number))
        exact = policy.sample_actions({"condition": row[None]}, noise)
        found = quantized.sample_actions({"condition": row[None]}, noise)
        wrong += float((found - exact).square().sum())
        whole += float(exact.square().sum())
    return wrong / whole


def constant(width: int, value: float, count: int = 12) -> Tensor:
    direction = torch.randn(width, generator=torch.Generator().manual_seed(7))
    return (value * direction).expand(count, -1).clone()


CASES = [(48, 0.0), (48, 1.0), (48, 10.0), (128, 1.0)]


@pytest.mark.parametrize(("width", "value"), CASES)
def test_a_condition_that_was_constant_costs_the_default_no_more_than_others(
    width: int, value: float
) -> None:
    shown = constant(width, value)
    ours = error(DEFAULT_RECIPE, shown, shown)
    others = [error(name, shown, shown) for name in ("rtn", "gptq", "foldquant")]
    assert ours <= 1.2 * min(others)


@pytest.mark.parametrize(("width", "value"), CASES)
@pytest.mark.parametrize("move", [1.0, -1.0])
def test_and_no_more_than_rounding_to_nearest_when_it_moves(
    width: int, value: float, move: float
) -> None:
    shown = constant(width, value)
    ours = error(DEFAULT_RECIPE, shown, shown + move)
    assert ours <= 1.2 * error("rtn", shown, shown + move)


def test_what_calibration_says_at_its_word_collapses_there() -> None:
    """The predecessor, whose smoothing has no prior: the case is a hard one."""
    shown = constant(48, 1.0)
    assert error("omega-w4a4-no-prior", shown, shown + 1.0) > 1.0


@pytest.mark.parametrize("varies", [False, True])
def test_one_outlier_channel_costs_no_more_than_without_any_transform(varies: bool) -> None:
    shown = constant(48, 1.0)
    generator = torch.Generator().manual_seed(1)
    shown += torch.randn(shown.shape, generator=generator)
    shown[:, 3] = 1e4
    if varies:
        shown[:, 3] *= torch.randn(len(shown), generator=generator)
    assert error(DEFAULT_RECIPE, shown, shown) <= 1.2 * error("gptq", shown, shown)


SITE = QuantizationSite("linear", ("linear",), "action_head", per_step=True)


def site_error(recipe: Recipe, linear: nn.Linear, shown: Tensor, later: Tensor) -> float:
    scheme = recipe.action_head
    assert scheme is not None
    clock = FlowClock()
    statistics = None
    if needs_statistics(scheme):
        statistics = SiteStatistics(SITE, linear.in_features, torch.Generator().manual_seed(0))
    with clock.step(0, 1.0):
        for number, rows in enumerate(shown.split(8)):
            if statistics is not None:
                statistics.update(rows, clock, number)
        simulated = SimulatedLinear(quantize_site(SITE, [linear], scheme, statistics), clock)
        exact, found = linear(later), simulated(later)
    return float((found - exact).detach().square().sum() / exact.detach().square().sum())


@settings(max_examples=8, deadline=None)
@given(
    width=st.integers(20, 140),
    part=st.floats(0.05, 0.9),
    value=st.floats(-100.0, 100.0),
    jitter=st.sampled_from([0.0, 1e-6, 1e-3]),
    seed=st.integers(0, 2**16),
)
def test_a_site_with_constant_channels_stands_a_deviation_of_one(
    width: int, part: float, value: float, jitter: float, seed: int
) -> None:
    """Over widths, shares of constant channels, constants, and whether they are exactly so.

    Where most channels were zero, the average that the prior goes by is of few: of 14 such sites
    the median had 2.1 and the worst 5.4 times the error of rounding to nearest, against 10⁷ times
    without a prior.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(width, 48)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        assert linear.bias is not None
        linear.bias.zero_()
    rows = torch.randn(256, width, generator=generator)
    fixed = torch.randperm(width, generator=generator)[: max(1, int(part * width))]
    still = jitter * torch.randn(256, len(fixed), generator=generator)
    rows[:, fixed] = value + still
    moved = rows.clone()
    moved[:, fixed] += 1.0
    for later, factor in ((rows, 1.2), (moved, 10.0)):
        limit = factor * site_error(Recipe.load("rtn"), linear, rows, later)
        assert site_error(Recipe.load(DEFAULT_RECIPE), linear, rows, later) <= limit


def test_inputs_that_never_vary_are_still_quantized_for_the_day_they_do() -> None:
    """A single row: no channel varies around its mean, and all weights are kept."""
    linear = nn.Linear(64, 32)
    rows = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    later = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert site_error(Recipe.load(DEFAULT_RECIPE), linear, rows, later) < 0.05


@pytest.mark.parametrize("rotation", ["second_moment", "greedy", "svd", "hadamard", "none"])
@pytest.mark.parametrize("magnitude", ["rms", "max"])
@pytest.mark.parametrize(
    "activations",
    [
        {"scale": "per_token", "clip": "search", "subtract_mean": True},
        {"scale": "per_step", "subtract_mean": True},
        {"scale": "per_step_or_token"},
    ],
)
def test_every_transform_and_scale_stands_a_deviation_with_the_prior(
    rotation: str, magnitude: str, activations: dict[str, Any]
) -> None:
    """Half of the channels nearly constant; then they move by what the others vary by.

    Without the prior the error is up to 240; with it 0.01 to 0.26, the largest where a static scale
    meets maxima.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight.normal_(std=0.1, generator=generator)
    rows = torch.randn(256, 64, generator=generator)
    rows[:, ::2] = 1.0 + 1e-3 * torch.randn(256, 32, generator=generator)
    moved = rows.clone()
    moved[:, ::2] += torch.randn(256, 32, generator=generator)
    errors: dict[str, float] = {}
    for prior in ("none", "contribution"):
        transform = {"rotation": rotation, "smoothing": 0.65, "magnitude": magnitude}
        scheme = {"transform": transform, "activations": activations, "prior": prior}
        content = {"name": "x", "description": "", "action_head": scheme}
        errors[prior] = site_error(Recipe.model_validate(content), linear, rows, moved)
    assert errors["contribution"] < min(0.35, errors["none"])
