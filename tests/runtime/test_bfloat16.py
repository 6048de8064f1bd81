"""The bfloat16 baseline: the same actions but for 8-bit significands, on the same path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graph_recorder import Recorder

from omega_qvla.calibration.observations import Observations
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime.bfloat16 import bfloat16_pass, in_bfloat16
from omega_qvla.runtime.graph import use_graphs


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_actions_are_those_of_float32_within_bfloat16(
    family: str, request: pytest.FixtureRequest, few: Observations, noise: np.ndarray
) -> None:
    """Each rounding is off by at most 2⁻⁹; dozens of them add up to well under 5 % of a chunk."""
    policy: NativePolicy = request.getfixturevalue(family)
    narrow = in_bfloat16(policy, "cpu")
    assert {p.dtype for p in narrow.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    for item in few:
        found, wanted = (p.sample_normalized(item, noise) for p in (narrow, policy))
        assert found.dtype == torch.float32
        error = float((found - wanted).norm() / wanted.norm())
        assert 0.0 < error < 0.05


@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_its_graph_gives_its_chunks_bit_for_bit(
    family: str, request: pytest.FixtureRequest, few: Observations, noise: np.ndarray
) -> None:
    narrow = in_bfloat16(request.getfixturevalue(family), "cpu")
    wanted = [narrow.sample_normalized(item, noise) for item in few]
    recorder = Recorder()
    use_graphs(narrow, compute=bfloat16_pass(narrow), backend=recorder, say=lambda _: None)
    for item, chunk in zip(few, wanted, strict=True):
        assert torch.equal(narrow.sample_normalized(item, noise), chunk)
    assert recorder.replayed == len(few)
