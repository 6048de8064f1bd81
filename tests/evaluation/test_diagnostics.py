from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from omega_qvla.api import quantize
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.evaluation.diagnostics import BINS, channel_profile, diagnose
from omega_qvla.evaluation.openloop import (
    draw_noises,
    measure_reference,
    measure_row,
    relative_error,
)
from omega_qvla.policies.base import sites_of
from omega_qvla.quantization.pipeline import quantize_policy, simulate
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import SimulatedPolicy
from omega_qvla.runtime.linear import QuantizedLinear

pytestmark = pytest.mark.long

SITE_KEYS = {"name", "component", "per_step", "in_features", "out_features", "times", "error"}
SITE_KEYS |= {"local_error", "absmax", "rms", "transformed_absmax", "transformed_rms", "limit"}


@pytest.fixture(scope="module")
def rounded(small_policy, few):
    return quantize(small_policy, few, "rtn")


@pytest.fixture(scope="module")
def document(small_policy, few, rounded):
    return diagnose(small_policy, rounded, few)


def watched_inputs(policy, path, observation, noise):
    """What a linear reads while the policy runs, call by call."""
    seen = []
    linear = policy.module.get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    policy.sample_actions(observation, noise=noise)
    handle.remove()
    return seen


def test_every_site_is_measured_at_every_denoising_step(document, small_policy, few):
    json.dumps(document, allow_nan=False)
    assert document["observations"] == len(few)
    assert [site["name"] for site in document["sites"]] == [s.name for s in sites_of(small_policy)]
    for site in document["sites"]:
        assert set(site) == SITE_KEYS
        steps = small_policy.steps if site["per_step"] else 1
        assert all(len(site[key]) == steps for key in ("error", "local_error", "absmax", "rms"))
        assert all(0 < value < 1 for value in site["local_error"])
        assert site["limit"] is None  # rtn has one scale per token, which clips nothing
    head = next(site for site in document["sites"] if site["per_step"])
    assert head["times"] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_action_error_is_that_of_the_comparison(document, small_policy, few, rounded):
    known = measure_reference(small_policy, few, 0, 1)
    row = measure_row(rounded, few, 0, 1, normalized=known.normalized)
    error = relative_error(row.chunks, known.chunks)
    assert document["action_error"] == pytest.approx(error)
    assert document["noise_floor"] == pytest.approx(known.floor)


def test_a_sites_own_error_and_range_are_those_of_its_matrix_product(
    document, small_policy, few, rounded
):
    """The oracle multiplies the watched inputs by the weights, in float64, apart from the hooks."""
    site = next(s for s in sites_of(small_policy) if len(s.linears) == 3 and not s.per_step)
    entry = next(e for e in document["sites"] if e["name"] == site.name)
    weights = [small_policy.module.get_submodule(path) for path in site.linears]
    integer = rounded.policy.module.get_submodule(site.linears[0])
    assert isinstance(integer, QuantizedLinear)
    wrong, whole, largest, inputs = 0.0, 0.0, 0.0, []
    noises = draw_noises(small_policy, len(few), 0)
    for observation, noise in zip(few, noises, strict=True):
        for x in watched_inputs(small_policy, site.linears[0], observation, noise):
            exact = torch.cat([F.linear(x, w.weight, w.bias) for w in weights], dim=-1).double()
            wrong += float((integer(x).double() - exact).square().sum())
            whole += float(exact.square().sum())
            largest = max(largest, float(x.abs().max()))
            inputs.append(x.flatten())
    # entries keep five significant digits
    assert entry["local_error"][0] == pytest.approx(wrong / whole, rel=1e-4)
    assert entry["absmax"][0] == pytest.approx(largest, rel=1e-4)
    rms = float(torch.cat(inputs).double().square().mean().sqrt())
    assert entry["rms"][0] == pytest.approx(rms, rel=1e-4)
    # without a transform the rounded rows are the rows themselves
    assert entry["transformed_absmax"] == entry["absmax"]


def test_the_first_site_has_no_error_but_its_own(document):
    """Nothing before it is quantized, and this call has few enough rows to be compared whole."""
    first = document["sites"][0]
    assert first["error"][0] == pytest.approx(first["local_error"][0], rel=1e-4)


def test_static_scales_show_what_they_reach(small_policy, few, omega_recipe):
    quantized = quantize(small_policy, few, omega_recipe)
    document = diagnose(small_policy, quantized, few[:1])
    for entry in document["sites"]:
        assert (entry["limit"] is not None) == entry["per_step"]
        if entry["limit"] is not None:
            linear = quantized.policy.module.get_submodule(
                next(s for s in sites_of(small_policy) if s.name == entry["name"]).linears[0]
            )
            reach = 7 * linear.activation_scale
            assert entry["limit"] == pytest.approx(reach.tolist(), rel=1e-4)


def test_a_simulation_is_diagnosed_like_integers(small_policy, few, rounded, document):
    """Both round to the same integers, so every figure but float summation order agrees."""
    quantization = quantize_policy(small_policy, few, Recipe.load("rtn"))
    simulated = SimulatedPolicy.__new__(SimulatedPolicy)
    simulated.policy = simulate(small_policy, quantization)
    simulated.policy.use_step_table(quantization.step_table)
    other = diagnose(small_policy, simulated, few)
    for ours, theirs in zip(document["sites"], other["sites"], strict=True):
        assert ours["local_error"] == pytest.approx(theirs["local_error"], rel=1e-3)
        assert ours["absmax"] == theirs["absmax"]


def test_gr00t_is_diagnosed_too(small_gr00t, few):
    document = diagnose(small_gr00t, quantize(small_gr00t, few, "rtn"), few[:1])
    assert {site["component"] for site in document["sites"]} >= {"backbone", "action_head"}


def test_the_policies_are_left_as_they_were(small_policy, few, rounded, noise):
    before = small_policy.sample_actions(few[0], noise=noise)
    diagnose(small_policy, rounded, few[:1])
    modules = (*small_policy.module.modules(), *rounded.policy.module.modules())
    assert not any(module._forward_hooks for module in modules)
    np.testing.assert_array_equal(small_policy.sample_actions(few[0], noise=noise), before)


def test_nothing_to_look_at_is_refused(small_policy, few, rounded):
    with pytest.raises(ObservationError, match="at least one"):
        diagnose(small_policy, rounded, [])
    with pytest.raises(PolicyError, match="nothing in this policy is quantized"):
        full = SimulatedPolicy.__new__(SimulatedPolicy)
        full.policy = small_policy
        diagnose(small_policy, full, few)


@pytest.mark.parametrize("channels", [1, 255, 256, 257, 4304, 16384])
def test_a_profile_is_short_and_loses_no_outlier(channels):
    largest = torch.rand(channels, generator=torch.Generator().manual_seed(channels))
    spike = channels * 2 // 3
    largest[spike] = 1e3
    profile = channel_profile(largest)
    width = -(-channels // BINS)
    assert len(profile) == -(-channels // width) <= BINS
    assert profile[spike // width] == 1e3
    assert sum(value > 1 for value in profile) == 1


def test_profiles_of_nothing_are_refused():
    with pytest.raises(ValueError, match="cannot put channels"):
        channel_profile(torch.zeros(0))
    with pytest.raises(ValueError, match="into 0 bins"):
        channel_profile(torch.zeros(3), bins=0)
