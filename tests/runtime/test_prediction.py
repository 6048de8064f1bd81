"""The bytes of an artifact before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.prediction import predict_directory

pytestmark = pytest.mark.long


def quantized(policy: Any, recipe: str, scope: Any) -> QuantizedPolicy:
    config = policy.config
    observations = Observations.random(config.cameras, config.state_dim, count=2)
    made = oq.quantize(policy, observations, recipe, scope=scope)
    assert isinstance(made, QuantizedPolicy)
    return made


@pytest.mark.parametrize("name", ["builtin:tiny-pi05", "builtin:tiny-gr00t"])
@pytest.mark.parametrize(
    ("recipe", "scope"), [("rtn", "paper"), ("gptq", "all"), ("svdquant", "all")]
)
def test_the_embedded_policies_take_what_was_predicted(
    name: str, recipe: str, scope: Any, tmp_path: Path
) -> None:
    made = quantized(stream_policy(name), recipe, scope)
    made.save_pretrained(tmp_path / "out")
    report = predict_directory(stream_policy(name), Recipe.load(recipe).scoped(scope))
    real = made.memory_report(directory_bytes=directory_bytes(tmp_path / "out"))
    assert report["total_bytes"] == pytest.approx(real["total_bytes"], rel=0.01)
    names = [row["name"] for row in report["components"]]
    assert names == [row["name"] for row in real["components"]]
