"""More held-out observations out of a policy's own episodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import omega_qvla as oq
from omega_qvla.evaluation.benchmark import benchmark_tasks

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "many_observations.py"
POLICY = "builtin:tiny-gr00t"


@pytest.mark.slow
def test_new_observations_are_held_out_and_the_calibration_stays_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "many.npz"
    command = [sys.executable, str(SCRIPT), "--policy", POLICY, "--out", str(out)]
    subprocess.run([*command, "--episodes", "1", "--every", "8"], check=True, timeout=600)
    kept, before = (oq.Observations.load(source, split="calibration") for source in (out, POLICY))
    assert len(kept) == len(before)
    assert all(
        np.array_equal(one["state"], other["state"]) and one["prompt"] == other["prompt"]
        for one, other in zip(kept, before, strict=True)
    )
    new = oq.Observations.load(out, split="heldout")
    assert {item["task"] for item in new} == set(benchmark_tasks(POLICY))
    states = {np.asarray(item["state"]).tobytes() for item in before}
    assert not states & {np.asarray(item["state"]).tobytes() for item in new}
