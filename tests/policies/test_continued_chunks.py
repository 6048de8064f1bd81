"""Real-time chunking of native policies: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from graph_recorder import Recorder
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.flow_time import euler_times
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.layers.flow import integrate
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.processing.normalization import NormalizationStatistics, Range
from omega_qvla.real_time_chunking import SCHEDULES, LeftOver, RealTimeChunking, guidance_weight
from omega_qvla.runtime.graph import use_graphs

HORIZON = 4


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((HORIZON, 4)).astype(np.float32)


@pytest.fixture(scope="module", params=["small_policy", "small_gr00t"])
def family(request: pytest.FixtureRequest) -> NativePolicy:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["full precision", "quantized"])
def sampled(request: pytest.FixtureRequest, family: NativePolicy, few: Observations) -> Any:
    return family if request.param == "full precision" else oq.quantize(family, few, recipe="rtn")


def plain_euler(policy: Any, observation: Any, start: np.ndarray) -> np.ndarray:
    """The flow without anything that guides it, step by step."""
    with torch.inference_mode():
        inputs = policy.processor.encode(observation)
        observed = policy.prefill(policy.encode_images(inputs))
        x = torch.from_numpy(start)[None]
        for t in euler_times(policy.steps):
            # One step of a whole schedule, from x at t: what `denoise` computes of it, undone.
            x = x - velocity(policy, observed, x, t) / policy.steps
        return policy.processor.decode(x[0], policy.processor.anchor(observation))


def velocity(policy: Any, observed: Any, x: torch.Tensor, t: float) -> torch.Tensor:
    """noise - actions at flow time t, from the network itself."""
    schedule, step = policy.schedule(policy.steps), round((1.0 - t) * policy.steps)
    with policy.clock.step(step, t):
        if isinstance(observed, tuple):  # pi0.5: keys and values, and the length of the prefix
            cache, length = observed
            rotary = policy.module.suffix_rotary(length)
            return policy.module.velocity(x, schedule[step : step + 1], cache, rotary)
        return -policy.module.velocity(x, schedule.row(step), observed)


def test_without_a_previous_chunk_every_bit_is_that_of_the_plain_flow(
    sampled: Any, few: Observations
) -> None:
    expected = plain_euler(sampled, few[0], noise(0))
    assert np.array_equal(sampled.sample_actions(few[0], noise(0)), expected)
    settings = RealTimeChunking(3, 2.0, "exp")
    given_settings = sampled.sample_actions(few[0], noise(0), chunking=settings)
    assert np.array_equal(given_settings, expected)


def test_the_actions_of_the_delay_come_out_as_those_of_the_previous_chunk(
    sampled: Any, few: Observations
) -> None:
    """The closer the earlier they are; without guidance they are another sample's."""
    before = sampled.sample_actions(few[0], noise(0))
    free = sampled.sample_actions(few[1], noise(1))
    ours = sampled.sample_actions(few[1], noise(1), previous=before[1:], delay=2)
    apart = np.abs(free[:2] - before[1:3]).max()
    assert np.abs(ours[:2] - before[1:3]).max() < 0.35 * apart
    assert not np.array_equal(ours[3:], before[3:])


def test_a_guided_chunk_is_the_formula_step_by_step(
    family: NativePolicy, few: Observations
) -> None:
    """x - (v - g·w·(previous - (x - t·v)))/n, in float64 but for the network."""
    before = family.sample_actions(few[0], noise(0))[1:]
    settings = RealTimeChunking(execution_horizon=3, max_guidance_weight=2.0, schedule="exp")
    weights = settings.prefix_weights(1, 3, HORIZON).astype(np.float64)[:, None]
    target = np.zeros((HORIZON, 4))
    target[:3] = family.processor.statistics.actions.normalize(before)
    with torch.inference_mode():
        inputs = family.processor.encode(few[1])
        observed = family.prefill(family.encode_images(inputs))
        x = noise(1).astype(np.float64)
        for t in euler_times(family.steps):
            given = torch.from_numpy(x.astype(np.float32))[None]
            v = velocity(family, observed, given, t)[0].numpy().astype(np.float64)
            v = v - min(2.0, guidance_weight(t)) * weights * (target - (x - t * v))
            x = x - v / family.steps
    expected = family.processor.decode(torch.from_numpy(x), None)
    ours = family.sample_actions(few[1], noise(1), previous=before, delay=1, chunking=settings)
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_robots_that_continue_and_robots_that_begin_share_a_batch(
    sampled: Any, few: Observations
) -> None:
    """Each gets what it gets alone; another delay and another schedule beside it change nothing."""
    before = sampled.sample_actions(few[0], noise(0))
    cases: list[tuple[LeftOver | None, RealTimeChunking]] = [
        (None, RealTimeChunking()),
        (LeftOver(before[1:], 1), RealTimeChunking()),
        (LeftOver(before[2:], 2), RealTimeChunking(schedule="ones", max_guidance_weight=1.0)),
    ]
    alone = [
        sampled.sample_batch([sampled.encode(seen, left, settings)], [noise(i)])[0]
        for i, (seen, (left, settings)) in enumerate(zip(few, cases, strict=True))
    ]
    encoded = [sampled.encode(seen, *case) for seen, case in zip(few, cases, strict=True)]
    for ours, expected in zip(
        sampled.sample_batch(encoded, [noise(i) for i in range(3)]), alone, strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.array_equal(alone[0], sampled.sample_actions(few[0], noise(0)))
    single = sampled.sample_actions(few[1], noise(1), previous=before[1:], delay=1)
    assert np.array_equal(alone[1], single)


def test_a_captured_pass_guides_with_what_each_call_brings(
    family: NativePolicy, few: Observations
) -> None:
    before = family.sample_actions(few[0], noise(0))
    wanted = [
        family.sample_actions(few[1], noise(1), previous=before[skip:], delay=1) for skip in (1, 2)
    ]
    free = family.sample_actions(few[1], noise(1))
    policy, recorder = family.clone(), Recorder()
    use_graphs(policy, backend=recorder, say=lambda _: None)
    for skip, expected in zip((1, 2), wanted, strict=True):
        ours = policy.sample_actions(few[1], noise(1), previous=before[skip:], delay=1)
        assert np.array_equal(ours, expected)
    assert np.array_equal(policy.sample_actions(few[1], noise(1)), free)
    assert (recorder.captured, recorder.replayed) == (2, 3)


def test_relative_actions_are_continued_from_the_state_of_the_new_observation(
    small_policy: Pi05Policy, few: Observations
) -> None:
    """It has moved: the same absolute actions are other differences, and come out the same."""
    config = small_policy.config.model_copy(update={"relative_actions": (True, True, False, True)})
    policy = small_policy.clone()
    policy.config = policy.module.config = config
    policy.processor = type(policy.processor)(
        config, policy.processor.statistics, policy.processor.tokenizer
    )
    moved = {**few[0], "state": few[0]["state"] + np.float32(0.25)}
    before = policy.sample_actions(few[0], noise(0))
    encoded = policy.encode(moved, LeftOver(before, 4), RealTimeChunking())
    assert encoded.guidance is not None
    decoded = policy.processor.decode(encoded.guidance.previous[0], encoded.anchor)
    np.testing.assert_allclose(decoded, before, atol=1e-6)
    ours = policy.sample_actions(moved, noise(1), previous=before, delay=4)
    free = policy.sample_actions(moved, noise(1))
    assert np.abs(ours - before).max() < 0.35 * np.abs(free - before).max()


def test_a_dimension_that_never_moved_guides_nothing(
    small_policy: Pi05Policy, few: Observations
) -> None:
    """Its float32 actions do not say what the network gave: one bit of them is 4 units there."""
    policy = small_policy.clone()
    bounds = Range(low=(-1.0, 0.3, -1.0, -1.0), high=(1.0, 0.3, 1.0, 1.0), flat_width=1e-8)
    statistics = NormalizationStatistics(state=policy.processor.statistics.state, actions=bounds)
    policy.processor = type(policy.processor)(policy.config, statistics, policy.processor.tokenizer)
    before = policy.sample_actions(few[0], noise(0))
    guidance = policy.encode(few[1], LeftOver(before, 2)).guidance
    assert guidance is not None
    assert not guidance.weights[0, :, 1].any() and bool(guidance.weights[0, 0, [0, 2, 3]].all())
    ours = policy.sample_actions(few[1], noise(1), previous=before, delay=2)
    assert np.abs(ours[:2] - before[:2]).max() < 0.2


# --- a module of the user's own --------------------------------------------------------------


def network() -> nn.Module:
    module = nn.ModuleDict({"llm": nn.Linear(16, 4), "exp": nn.Linear(4, 4)})
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return module


def continuing(
    module: Any, observation: Any, start: Any, clock: oq.FlowClock, left_over: Any, chunking: Any
) -> torch.Tensor:
    """A sample function that guides its own flow."""
    memory, guidance = module["llm"](observation["x"]), None
    if left_over is not None:
        guidance = Guidance.to(left_over, chunking, (HORIZON, 4))
    return integrate(lambda x, _: module["exp"](x + memory), start, 4, clock, guidance)[0]


def beginning(module: Any, observation: Any, start: Any, clock: oq.FlowClock) -> torch.Tensor:
    return continuing(module, observation, start, clock, None, None)


def of_module(sample: Any) -> oq.TorchPolicy:
    return oq.TorchPolicy(
        network(),
        sample=sample,
        backbone="llm",
        action_head="exp",
        steps=4,
        noise_shape=(1, HORIZON, 4),
    )


def test_a_sample_function_that_can_continues_the_previous_chunk() -> None:
    """Before and after quantizing; without a previous chunk it is told that there is none."""
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(1, 16, generator=generator)} for _ in range(4)]
    start = torch.randn(1, HORIZON, 4, generator=generator)
    full = of_module(continuing)
    for policy in (full, oq.quantize(full, data)):
        before = policy.sample_actions(data[0], -start)
        free = policy.sample_actions(data[1], start)
        ours = policy.sample_actions(data[1], start, previous=before[1:], delay=3)
        assert (ours[:3] - before[1:]).abs().max() < 0.35 * (free[:3] - before[1:]).abs().max()
    unguided = of_module(beginning).sample_actions(data[1], start)
    assert torch.equal(full.sample_actions(data[1], start), unguided)


def test_a_sample_function_that_cannot_is_named_and_never_ignores_the_previous_chunk() -> None:
    policy = of_module(beginning)
    with pytest.raises(PolicyError, match="left_over and chunking"):
        policy.sample_actions({"x": torch.zeros(1, 16)}, previous=np.zeros((2, 4)), delay=1)
    with pytest.raises(ObservationError, match="previous without delay"):
        policy.sample_actions({"x": torch.zeros(1, 16)}, previous=np.zeros((2, 4)))


# --- settings --------------------------------------------------------------------------------


@given(
    schedule=st.sampled_from(SCHEDULES),
    horizon=st.integers(1, 60),
    data=st.data(),
    execution_horizon=st.integers(1, 80),
)
def test_weights_fall_from_the_delay_to_the_horizon(
    schedule: Any, horizon: int, data: st.DataObject, execution_horizon: int
) -> None:
    left = data.draw(st.integers(1, horizon))
    delay = data.draw(st.integers(0, left))
    settings = RealTimeChunking(execution_horizon, schedule=schedule)
    weights = settings.prefix_weights(delay, left, horizon)
    end = min(max(execution_horizon, delay), left)
    assert weights.shape == (horizon,) and weights.dtype == np.float32
    assert np.all(weights[:delay] == 1.0) and np.all(weights[end:] == 0.0)
    assert np.all(np.diff(weights) <= 0.0)
    between = weights[delay:end]
    expected = {"zeros": between == 0.0, "ones": between == 1.0}
    assert np.all(expected.get(schedule, (between > 0.0) & (between < 1.0)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"execution_horizon": 0}, "execution_horizon"),
        ({"execution_horizon": 2.5}, "execution_horizon"),
        ({"execution_horizon": True}, "execution_horizon"),
        ({"max_guidance_weight": 0.0}, "max_guidance_weight"),
        ({"max_guidance_weight": float("nan")}, "max_guidance_weight"),
        ({"max_guidance_weight": float("inf")}, "max_guidance_weight"),
        ({"schedule": "LINEAR"}, "linear, exp, ones, zeros"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        RealTimeChunking(**settings)


LEFT = np.zeros((3, 4), np.float32)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"previous": LEFT}, "previous without delay"),
        ({"delay": 1}, "delay=1 without previous"),
        ({"previous": LEFT, "delay": 4}, "delay=4 control steps, but previous has only 3"),
        ({"previous": LEFT, "delay": -1}, "0 or more"),
        ({"previous": LEFT, "delay": 1.0}, "whole number"),
        ({"previous": LEFT[:0], "delay": 0}, r"\[0, 4\]"),
        ({"previous": LEFT[0], "delay": 0}, r"\[4\]"),
        ({"previous": LEFT[:, :3], "delay": 0}, r"at most 4, 4\].*\[3, 3\]"),
        ({"previous": np.zeros((5, 4)), "delay": 0}, r"\[5, 4\]"),
        ({"previous": np.full((3, 4), np.nan), "delay": 0}, "action 0, dimension 0"),
        ({"previous": [["a"] * 4], "delay": 0}, "not numeric"),
    ],
)
def test_a_left_over_that_cannot_be_is_refused_by_name(
    family: NativePolicy, few: Observations, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ObservationError, match=named):
        family.sample_actions(few[0], noise(0), **arguments)


def test_a_left_over_is_the_robots_own_copy() -> None:
    actions: Sequence[Any] = np.zeros((2, 3), np.float64)
    left = LeftOver(actions, np.int64(1))
    actions[0][0] = 9.0
    assert left.actions.dtype == np.float32 and not left.actions.any() and left.delay == 1
