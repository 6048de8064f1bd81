"""Every built-in method on whole small policies: it runs, round-trips, and says what it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization.pipeline import quantize_policy
from omega_qvla.recipe import Recipe, ablation_names, recipe_names
from omega_qvla.runtime.description import kept_linears
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.prediction import predict, predict_directory, weight_storage

REALIZABLE = [name for name in recipe_names() if Recipe.load(name).realizable]
NEW = ["duquant", "foldquant", "gptq", "quantvla", "quarot", "smoothquant", "svdquant"]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("family", ["small_policy", "small_gr00t"])
def test_what_is_saved_is_what_runs_and_what_was_predicted(
    name: str,
    family: str,
    request: pytest.FixtureRequest,
    few: Observations,
    noise: np.ndarray,
    tmp_path: Path,
) -> None:
    """Low-rank branches and linears left in 16 bits included; the actions bit for bit."""
    policy: Any = request.getfixturevalue(family)
    made = oq.quantize(policy, few, name)
    assert isinstance(made, QuantizedPolicy)
    artifact = made.save_pretrained(tmp_path / "artifact")
    loaded = oq.load(artifact)
    exact = policy.sample_actions(few[0], noise)
    chunk = loaded.sample_actions(few[0], noise)
    assert np.array_equal(chunk, made.sample_actions(few[0], noise))
    # Random weights quantize badly; unrelated chunks would differ by the actions' own size.
    assert np.square(chunk - exact).mean() < 0.2 * np.square(exact).mean()
    assert loaded.memory_report() == predict(policy, Recipe.load(name))
    planned = predict_directory(policy, Recipe.load(name))["total_bytes"]
    assert planned == pytest.approx(directory_bytes(artifact), rel=0.01)


def test_eight_bit_activations_leave_the_weights_as_they_are(
    small_policy: Pi05Policy, few: Observations
) -> None:
    four, eight = (
        quantize_policy(small_policy, few, Recipe.load(name)).sites
        for name in ("omega-w4a4", "omega-w4a8")
    )
    for one, other in zip(four, eight, strict=True):
        assert torch.equal(one.weight.integers, other.weight.integers)
        assert torch.equal(one.weight.scale, other.weight.scale)
        assert (one.activations.bits, other.activations.bits) == (4, 8)


@pytest.mark.parametrize("name", ablation_names())
def test_every_ablation_runs_as_integers(
    name: str, small_policy: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    """Blocks other than 64 included: only the kernel's fused transform knows no others."""
    made = oq.quantize(small_policy, few, name)
    assert isinstance(made, QuantizedPolicy)
    loaded = oq.load(made.save_pretrained(tmp_path / "artifact"))
    chunk = made.sample_actions(few[0], noise)
    assert np.isfinite(chunk).all()
    assert np.array_equal(loaded.sample_actions(few[0], noise), chunk)


@pytest.mark.parametrize("name", ["svdquant", "quantvla"])
def test_an_interrupted_run_resumes_to_the_same_actions(
    name: str, small_policy: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, _total: int, _what: str) -> None:
        if done == 5:
            raise StopError

    whole = oq.quantize(small_policy, few, name).sample_actions(few[0], noise)
    with pytest.raises(StopError):
        oq.quantize(small_policy, few, name, work_directory=tmp_path, progress=stop)
    resumed = oq.quantize(small_policy, few, name, work_directory=tmp_path, resume=True)
    assert np.array_equal(resumed.sample_actions(few[0], noise), whole)


def test_a_selective_layout_keeps_the_heads_attention_and_matches_it(
    small_policy: Pi05Policy, few: Observations
) -> None:
    recipe = Recipe.load("quantvla")
    kept = kept_linears(sites_of(small_policy), recipe)
    assert kept == [
        f"paligemma_with_expert.gemma_expert.model.layers.{i}.self_attn.{name}_proj"
        for i in (0, 1)
        for name in "qkvo"
    ]
    quantization = quantize_policy(small_policy, few, recipe)
    assert {site.site.component for site in quantization.sites} == {"backbone", "action_head"}
    assert not set(kept) & {name for site in quantization.sites for name in site.site.linears}
    assert len(quantization.attention) == 2


def test_bits_per_weight_count_integers_scales_branches_and_16_bit_weights(
    small_policy: Pi05Policy,
) -> None:
    """By hand: integers of 4 bits in rows of whole blocks, one float32 per row, 16 elsewhere."""

    def by_hand(recipe: Recipe, rank: int, group: int | None) -> tuple[float, int]:
        bits, weights, kept = 0, 0, 0
        for site in sites_of(small_policy):
            linears = [small_policy.module.get_submodule(name) for name in site.linears]
            rows, width = sum(x.out_features for x in linears), linears[0].in_features
            weights += rows * width
            if recipe.scheme_of(site) is None:
                kept += rows * width
                bits += 16 * rows * width
                continue
            padded = -(-width // 64) * 64
            scales = 1 if group is None else padded // group
            bits += rows * (4 * padded + 32 * scales)
            bits += 16 * min(rank, rows, width) * (rows + width)
        return bits / weights, kept

    for name, rank, group in (
        ("omega-w4a4-static", 0, None),
        ("svdquant", 32, 64),
        ("quantvla", 0, None),
    ):
        recipe = Recipe.load(name)
        storage = weight_storage(small_policy, recipe)
        assert (storage.bits_per_weight, storage.weights_16bit) == by_hand(recipe, rank, group)


def test_every_description_cites_its_paper() -> None:
    ours = {"rtn", "omega-w4a4-static", "omega-w4a4-no-prior", "omega-w4a4", "omega-w4a8"}
    for name in recipe_names():
        assert name in ours or "arXiv" in Recipe.load(name).description, name


def test_only_realizable_methods_are_integers(small_policy: Pi05Policy, few: Observations) -> None:
    assert set(recipe_names()) - set(REALIZABLE) == {"omega-paper"}
    assert isinstance(oq.quantize(small_policy, few, "omega-paper"), SimulatedPolicy)
