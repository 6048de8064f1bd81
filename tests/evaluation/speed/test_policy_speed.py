"""The policy benchmark: real processes on the embedded policy."""

from __future__ import annotations

from pathlib import Path

import pytest

import omega_qvla as oq
from omega_qvla.errors import OmegaError, RecipeError, ResourceError
from omega_qvla.evaluation.speed.policy_speed import Subject, measure_policies

pytestmark = pytest.mark.long

CONTRACT = {
    "policy", "precision", "vision_ms", "prefix_ms", "denoise_ms", "total_ms", "peak_rss_bytes",
    "load_s", "checkpoint_bytes",
}  # fmt: skip


def test_one_row_per_precision_with_parts_that_add_up(tmp_path: Path) -> None:
    policy = oq.load_policy("builtin:tiny-pi05")
    few = list(oq.Observations.load("builtin:tiny-pi05"))[:2]
    oq.quantize(policy, few, "rtn").save_pretrained(tmp_path / "out")
    subjects = [
        Subject("tiny", "fp32", "builtin:tiny-pi05", 1),
        Subject("tiny", "w4a4", str(tmp_path / "out"), 1, "reference"),
    ]
    fp32, w4a4 = measure_policies(subjects, rounds=1)
    for row in (fp32, w4a4):
        assert set(row) >= CONTRACT
        parts = row["vision_ms"] + row["prefix_ms"] + row["denoise_ms"]
        assert row["total_ms"] == pytest.approx(parts, rel=1e-6)
        assert row["peak_rss_bytes"] > 50e6 and row["prefix_tokens"] > 72
    assert (fp32["kernel"], w4a4["kernel"]) == ("torch", "reference")
    assert w4a4["checkpoint_bytes"] < fp32["checkpoint_bytes"]
    assert w4a4["weight_bytes_read"] < fp32["weight_bytes_read"] / 3


def test_an_error_in_a_process_arrives_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(OmegaError, match="no policy at"):
        measure_policies([Subject("x", "fp32", str(tmp_path / "none"), 1)], rounds=1)


def test_no_rounds_and_too_many_threads_are_refused_before_anything_starts() -> None:
    with pytest.raises(RecipeError, match="rounds=0"):
        measure_policies([], rounds=0)
    with pytest.raises(ResourceError, match="cores"):
        measure_policies([Subject("x", "fp32", "builtin:tiny-pi05", 999)], rounds=1)
