"""Attention temperature matching and output head balancing, on drifts that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import HasHeadAttention
from omega_qvla.policies.layers.attention import attend, attention_logits
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization.attention import (
    AttentionFactors,
    match_attention,
    matching_factor,
    scale_attention,
)


def test_the_factor_is_the_ratio_inside_its_band_and_limit() -> None:
    """By hand: ln 1.02 is inside the neutral band, ln 2 = 0.69 beyond the limit of 0.4."""
    full = torch.tensor([1.2, 1.02, 2.0, 0.25, 0.0, 1.0]).double()
    quantized = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]).double()
    expected = torch.tensor([1.2, 1.0, math.exp(0.4), math.exp(-0.4), 1.0, 1.0]).double()
    torch.testing.assert_close(matching_factor(full, quantized), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_what_attention_takes_the_softmax_of(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 8, generator=generator)
    k, v = (torch.randn(1, kv_heads, 5, 8, generator=generator) for _ in range(2))
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 4] = False
    for hidden in (None, mask):
        weights = attention_logits(q, k, hidden).softmax(-1)
        expected = weights @ v.repeat_interleave(4 // kv_heads, dim=1)
        expected = expected.transpose(-3, -2).flatten(-2)
        torch.testing.assert_close(attend(q, k, v, hidden), expected)


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_a_drift_of_queries_and_outputs_is_found_and_undone(
    family: str, request: pytest.FixtureRequest, few: Observations, noise: np.ndarray
) -> None:
    """The first layer's projections times 0.8 and 1.25: its factors are their inverses.

    Exactly so at the first step; later ones start from actions that have drifted as well, and the
    sizes over all steps are off by some thousandths.
    """
    policy: Any = request.getfixturevalue(family)
    assert isinstance(policy, HasHeadAttention)
    first = policy.head_attention()[0]
    drifted: Any = policy.clone()
    heads = torch.full((first.heads,), 0.8, dtype=torch.float64)
    scale_attention(drifted, [AttentionFactors(first, heads, 1.25)])
    before = policy.module.get_submodule(first.query).weight.clone()
    found = match_attention(policy, drifted, few, seed=0)
    assert [item.layer for item in found] == list(policy.head_attention())
    torch.testing.assert_close(found[0].query, 1 / heads, rtol=0.02, atol=0.0)
    assert found[0].output == pytest.approx(0.8, rel=0.02)
    assert torch.equal(policy.module.get_submodule(first.query).weight, before)


def test_a_policy_without_drift_is_left_alone(
    small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    twin = small_policy.clone()
    found = match_attention(small_policy, twin, few, seed=0)
    assert all(bool((item.query == 1).all()) and item.output == 1 for item in found)
    assert np.array_equal(
        twin.sample_actions(few[0], noise), small_policy.sample_actions(few[0], noise)
    )


def test_scaled_weights_that_fit_16_bits_still_do(small_policy: Pi05Policy) -> None:
    layer = small_policy.head_attention()[0]
    policy = small_policy.clone()
    query: Any = policy.module.get_submodule(layer.query)
    query.weight = torch.nn.Parameter(query.weight.bfloat16().float(), requires_grad=False)
    factor = torch.full((layer.heads,), 1.1, dtype=torch.float64)
    scale_attention(policy, [AttentionFactors(layer, factor, 1.1)])
    assert torch.equal(query.weight.bfloat16().float(), query.weight)
    output: Any = policy.module.get_submodule(layer.output)
    assert not torch.equal(output.weight.bfloat16().float(), output.weight)


def test_a_policy_that_does_not_name_its_attention_is_refused(few: Observations) -> None:
    class Nameless:
        family = "torch"

    with pytest.raises(PolicyError, match="torch policy does not name the attention layers"):
        match_attention(Nameless(), Nameless(), few, seed=0)  # type: ignore[arg-type]
