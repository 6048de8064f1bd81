"""Benchmark v1 is what it was: the shipped policies and observations are the frozen ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

import omega_qvla as oq
from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.benchmark import BENCHMARK, FrozenPolicy, benchmark_tasks
from omega_qvla.quantization.pipeline import weights_fingerprint


@pytest.mark.parametrize("name", BENCHMARK.policies)
def test_shipped_policies_are_the_frozen_ones(name: str) -> None:
    source = f"builtin:{name}"
    found = FrozenPolicy(
        weights_fingerprint(oq.load_policy(source)),
        oq.Observations.load(source).fingerprint,
        oq.Observations.load(source, split="heldout").fingerprint,
    )
    BENCHMARK.require(name, found)
    assert tuple(benchmark_tasks(source)) == BENCHMARK.tasks
    with pytest.raises(PolicyError, match="other heldout"):
        BENCHMARK.require(name, replace(found, heldout="0"))
