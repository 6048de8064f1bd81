"""Policies with centred inputs as wholes: saved, loaded, damaged, run with other step counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import omega_qvla as oq
from omega_qvla.artifact import read_artifact, write_artifact
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ArtifactError
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization.pipeline import quantize_policy, simulate
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy, build
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.runtime.prediction import predict

pytestmark = pytest.mark.long

STEPPED = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.qkv_proj"
ONCE = "paligemma_with_expert.paligemma.model.language_model.layers.0.mlp.down_proj"
RECIPE = "omega-w4a4-static-per-token-subtract-mean-clip"


@pytest.fixture(scope="module")
def quantized(small_policy: Pi05Policy, few: Observations) -> QuantizedPolicy:
    made = oq.quantize(small_policy, few, RECIPE)
    assert isinstance(made, QuantizedPolicy)
    return made


@pytest.fixture(scope="module")
def saved(quantized: QuantizedPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_pretrained(tmp_path_factory.mktemp("centred") / "artifact")


def test_offsets_are_stored_per_step_with_the_bias_that_belongs_to_them(
    quantized: QuantizedPolicy,
) -> None:
    tensors = quantized.tensors()
    for site, steps in ((STEPPED, 4), (ONCE, 1)):
        offset, bias = tensors[f"{site}.activation_offset"], tensors[f"{site}.bias"]
        assert offset.dtype == torch.bfloat16 and len(offset) == len(bias) == steps
        assert tensors[f"{site}.activation_step_times"].shape == (steps,)
        assert f"{site}.activation_scale" not in tensors
    records = {site["name"]: site for site in quantized.config["sites"]}
    assert 0.4 <= records[STEPPED]["activation_clip"] <= 1.0


@pytest.mark.parametrize("time", [1.0, 0.75, 2 / 3, 0.1])
def test_every_layer_is_its_simulation_at_any_flow_time(
    time: float, small_policy: Pi05Policy, few: Observations
) -> None:
    """Calibrated times, one between, one beyond.  (In whole chunks roundings flip.)"""
    made = quantize_policy(small_policy, few, Recipe.load(RECIPE))
    integers, simulated = build(small_policy, made), simulate(small_policy, made)
    assert isinstance(integers, QuantizedPolicy)
    compared = 0
    for name, layer in integers.policy.module.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        rows = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(compared))
        with integers.policy.clock.step(0, time), simulated.clock.step(0, time):
            found, wanted = layer(rows), simulated.module.get_submodule(name)(rows)
        assert (found - wanted).square().mean() < 1e-8 * wanted.square().mean(), name
        compared += 1
    assert compared == len(integers.sites)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_any_number_of_steps_runs(
    steps: int, quantized: QuantizedPolicy, saved: Path, few: Observations, noise: np.ndarray
) -> None:
    chunk = quantized.sample_actions(few[0], noise, steps=steps)
    assert np.isfinite(chunk).all()
    assert np.array_equal(oq.load(saved).sample_actions(few[0], noise, steps=steps), chunk)


def test_its_size_was_predicted(
    quantized: QuantizedPolicy, saved: Path, small_policy: Pi05Policy
) -> None:
    assert oq.load(saved).memory_report() == predict(small_policy, Recipe.load(RECIPE))
    assert quantized.memory_report() == predict(small_policy, Recipe.load(RECIPE))


@pytest.mark.parametrize("kind", ["activation_offset", "activation_step_times", "bias"])
@pytest.mark.parametrize("damage", ["missing", "misshaped", "mistyped"])
@pytest.mark.parametrize("site", [STEPPED, ONCE], ids=["stepped", "once"])
def test_a_damaged_offset_is_refused_by_name(
    site: str, kind: str, damage: str, saved: Path, tmp_path: Path
) -> None:
    artifact = read_artifact(saved)
    tensors = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    tensor: Tensor = tensors.pop(f"{site}.{kind}")
    if damage == "misshaped":
        tensors[f"{site}.{kind}"] = torch.cat((tensor, tensor))
    elif damage == "mistyped":
        tensors[f"{site}.{kind}"] = tensor.to(torch.float16)
    write_artifact(
        tmp_path / "bad",
        config=artifact.config,
        tensors=tensors,
        processor=artifact.processor,
        card="",
    )
    with pytest.raises(ArtifactError, match=site):
        oq.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("clip", "recipe"),
    [(None, RECIPE), (0.0, RECIPE), (1.5, RECIPE), ("0.9", RECIPE), (0.9, "omega-w4a4-static")],
)
def test_a_clip_that_does_not_fit_its_recipe_is_refused(
    clip: Any, recipe: str, saved: Path, small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    folder = saved
    if recipe != RECIPE:
        folder = oq.quantize(small_policy, few, recipe).save_pretrained(tmp_path / "other")
    artifact = read_artifact(folder)
    sites = [dict(site) for site in artifact.config["sites"]]
    sites[0].pop("activation_clip", None)
    if clip is not None:
        sites[0]["activation_clip"] = clip
    write_artifact(
        tmp_path / "bad",
        config={**artifact.config, "sites": sites},
        tensors=artifact.tensors,
        processor=artifact.processor,
        card="",
    )
    with pytest.raises(ArtifactError, match="activation_clip"):
        oq.load(tmp_path / "bad")
