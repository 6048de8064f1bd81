"""What a chunk reads is counted, not declared: every weight as often as it is computed with."""

from __future__ import annotations

import pytest

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.chunk_reads import chunk_reads
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.native import NativePolicy

FAMILIES = ("small_policy", "small_gr00t")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_reads_each_part_as_often_as_it_runs(
    family: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    policy: NativePolicy = request.getfixturevalue(family)
    times, tokens = chunk_reads(policy, few[0])
    per_step = [site for site in sites_of(policy) if site.per_step]
    once = [site for site in sites_of(policy) if not site.per_step]
    assert {times[path] for site in per_step for path in site.linears} == {policy.steps}
    assert {times[path] for site in once for path in site.linears} == {1.0}
    assert times[policy.embedding_path] == 0.0
    assert tokens > 2 * policy.config.tokens_per_image


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_flow_time_are_not_read_once_a_schedule_is_known(
    family: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    policy = request.getfixturevalue(family)
    times, _ = chunk_reads(policy, few[0])
    paths = {
        path
        for path in times
        if any(path == outer or path.startswith(f"{outer}.") for outer in policy.modulation_paths)
    }
    assert paths and {times[path] for path in paths} == {0.0}


def test_of_stacked_embodiments_one_is_read(small_gr00t: NativePolicy, few: Observations) -> None:
    times, _ = chunk_reads(small_gr00t, few[0])
    kept = len(small_gr00t.config.embodiments)
    assert kept > 1
    assert times["action_head.action_encoder.W2"] == small_gr00t.steps / kept
    assert times["action_head.state_encoder.layer1"] == 1 / kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_policy_reads_its_sites_as_often(
    family: str, request: pytest.FixtureRequest, few: Observations
) -> None:
    policy = request.getfixturevalue(family)
    quantized = oq.quantize(policy, few, "rtn").policy
    assert isinstance(quantized, NativePolicy)
    full, integers = chunk_reads(policy, few[0])[0], chunk_reads(quantized, few[0])[0]
    for site in sites_of(policy):
        assert integers[site.linears[0]] == full[site.linears[0]], site.name
