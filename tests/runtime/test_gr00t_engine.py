"""GR00T N1.5 as a whole: quantized, saved, loaded, run; streamed; with fewer embodiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import omega_qvla as oq
from omega_qvla.artifact import read_artifact, write_artifact
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ArtifactError, PolicyError
from omega_qvla.evaluation.outlier_injection import outlier_injected
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy, KeptRows
from omega_qvla.policies.gr00t_n15.stages import BLOCKS
from omega_qvla.quantization.pipeline import quantize_policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.runtime.prediction import predict

SITES = 4 + 1 + 2 * 4 + 4 + 1 + 4 + 4
CROSS = f"{BLOCKS}.0.attn1.to_kv"
QUERY = f"{BLOCKS}.0.attn1.to_q"


@pytest.fixture(scope="module")
def quantized(small_gr00t: Gr00tN15Policy, few: Observations) -> QuantizedPolicy:
    result = oq.quantize(small_gr00t, few)
    assert isinstance(result, QuantizedPolicy)
    return result


@pytest.fixture(scope="module")
def saved(quantized: QuantizedPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_pretrained(tmp_path_factory.mktemp("gr00t") / "artifact")


def directory_bytes(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def relative_difference(ours: QuantizedPolicy, exact: Any, few: Observations, noise: Any) -> float:
    pairs = [(ours.sample_actions(o, noise), exact.sample_actions(o, noise)) for o in few]
    a, b = (np.stack(side) for side in zip(*pairs, strict=True))
    return float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))


@pytest.mark.parametrize("steps", [None, 1, 3, 8])
def test_the_round_trip_gives_the_same_actions_bit_for_bit(
    steps: int | None,
    quantized: QuantizedPolicy,
    saved: Path,
    few: Observations,
    noise: np.ndarray,
) -> None:
    loaded = oq.load(saved)
    for item in few:
        chunk = quantized.sample_actions(item, noise, steps=steps)
        assert np.array_equal(loaded.sample_actions(item, noise, steps=steps), chunk)
        assert chunk.shape == (4, 4) and np.isfinite(chunk).all()


def test_a_loaded_policy_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    oq.load(saved).save_pretrained(tmp_path / "copy")
    assert directory_bytes(tmp_path / "copy") == directory_bytes(saved)


def test_the_integers_come_close_to_the_full_precision_policy(
    quantized: QuantizedPolicy, small_gr00t: Gr00tN15Policy, few: Observations, noise: np.ndarray
) -> None:
    """Random weights quantize badly; a fifth of the actions' size is far from unrelated chunks."""
    assert relative_difference(quantized, small_gr00t, few, noise) < 0.2


def test_every_linear_is_integers_but_the_projection_out(quantized: QuantizedPolicy) -> None:
    modules = dict(quantized.policy.module.named_modules())
    assert sum(isinstance(m, QuantizedLinear) for m in modules.values()) == SITES
    left = {name for name, m in modules.items() if isinstance(m, nn.Linear)}
    assert left == {"action_head.model.proj_out_2"}


def test_cross_keys_and_values_scale_per_token_and_queries_per_step(
    quantized: QuantizedPolicy,
) -> None:
    tensors = quantized.tensors()
    assert f"{CROSS}.activation_scale" not in tensors
    assert tensors[f"{QUERY}.activation_step_times"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert tensors[f"{CROSS}.weight_shape"].tolist() == [128, 64]


@pytest.mark.parametrize("recipe", ["rtn", "omega-w4a4-static", "omega-w4a4-no-prior"])
@pytest.mark.parametrize("scope", ["all", "paper"])
def test_the_predicted_memory_is_the_real_one(
    recipe: str, scope: Any, small_gr00t: Gr00tN15Policy, few: Observations
) -> None:
    result = oq.quantize(small_gr00t, few, recipe, scope=scope)
    assert result.memory_report() == predict(small_gr00t, Recipe.load(recipe).scoped(scope))


def test_the_paper_s_recipe_runs_as_a_simulation(
    small_gr00t: Gr00tN15Policy, few: Observations, noise: np.ndarray
) -> None:
    simulated = oq.quantize(small_gr00t, few, "omega-paper")
    assert relative_difference(simulated, small_gr00t, few, noise) < 0.3


def test_every_site_is_quantized_once_with_and_without_cascade(
    small_gr00t: Gr00tN15Policy, few: Observations, omega_recipe: Recipe
) -> None:
    expected = [site.name for site in sites_of(small_gr00t)]
    for cascade in (True, False):
        recipe = omega_recipe.model_copy(update={"cascade": cascade})
        found = quantize_policy(small_gr00t, few, recipe).sites
        assert [site.site.name for site in found] == expected
    assert len(expected) == SITES


def test_the_step_table_is_exact_at_its_counts(
    quantized: QuantizedPolicy, small_gr00t: Gr00tN15Policy
) -> None:
    """Exact up to summation order, 1e-5; the policy's own 4 steps and the 8 of LIBERO are there."""
    for steps in (4, 5, 8, 10, 16):
        exact, found = small_gr00t.schedule(steps), quantized.policy.schedule(steps)
        assert (exact.modulation - found.modulation).abs().max() < 1e-5
        assert torch.equal(exact.time_part, found.time_part)


def test_a_table_of_another_shape_is_refused(saved: Path, tmp_path: Path) -> None:
    artifact = read_artifact(saved)
    tensors = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    tensors["step_table.values"] = tensors["step_table.values"][..., :1, :].contiguous()
    write_artifact(
        tmp_path / "bad",
        config=artifact.config,
        tensors=tensors,
        processor=artifact.processor,
        card="",
    )
    with pytest.raises(ArtifactError, match=r"step_table\.values"):
        oq.load(tmp_path / "bad")


def test_quantizing_in_pieces_gives_the_bytes_of_quantizing_in_memory(tmp_path: Path) -> None:
    whole, streamed = (load("random:tiny-gr00t") for load in (load_policy, stream_policy))
    config = whole.config
    few = Observations.random(
        config.cameras, config.state_dim, count=1, size=config.vision.image_size
    )
    oq.quantize(whole, few, "rtn").save_pretrained(tmp_path / "whole")
    made = oq.quantize(streamed, few, "rtn", work_directory=tmp_path / "journal")
    made.save_pretrained(tmp_path / "streamed")
    assert directory_bytes(tmp_path / "streamed") == directory_bytes(tmp_path / "whole")


def test_one_embodiment_alone_gives_the_same_actions_in_fewer_bytes(
    quantized: QuantizedPolicy, small_gr00t: Gr00tN15Policy, few: Observations, noise: np.ndarray
) -> None:
    alone = oq.quantize(small_gr00t.keep_embodiments((1,)), few)
    chunk = alone.sample_actions(few[0], noise)
    assert np.array_equal(chunk, quantized.sample_actions(few[0], noise))
    ours, all_three = alone.memory_report(), quantized.memory_report()
    assert ours["total_bytes"] < all_three["total_bytes"]
    assert ours["reference_bytes"] == all_three["reference_bytes"]


def test_loaded_embodiments_stay_in_16_bits_and_act_the_same(tmp_path: Path) -> None:
    """Widening the one matrix that is used is exact, so not a bit of the actions may change."""
    policy = load_policy("random:tiny-gr00t")
    size = policy.config.vision.image_size
    one = Observations.random(policy.config.cameras, 4, count=1, size=size)
    result = oq.quantize(policy, one, "rtn")
    result.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out")
    stack = loaded.policy.module.get_parameter("action_head.action_encoder.W2.W")
    assert stack.dtype == torch.bfloat16
    start = np.zeros(policy.noise_shape, np.float32)
    assert np.array_equal(
        loaded.sample_actions(one[0], start), result.sample_actions(one[0], start)
    )
    assert loaded.memory_report() == result.memory_report()


def test_embodiments_are_chosen_before_quantizing(quantized: QuantizedPolicy) -> None:
    with pytest.raises(PolicyError, match="before quantizing"):
        quantized.policy.keep_embodiments((1,))


def test_a_streamed_policy_reads_only_the_kept_embodiments() -> None:
    streamed = stream_policy("random:tiny-gr00t")
    assert isinstance(streamed, Gr00tN15Policy)
    fewer = streamed.keep_embodiments((0,))
    assert isinstance(fewer.store, KeptRows) and streamed.store is not None
    name = "action_head.action_encoder.W2.W"
    assert torch.equal(fewer.store.read(name), streamed.store.read(name)[[0]])
    other = "action_head.vlln.weight"
    assert torch.equal(fewer.store.read(other), streamed.store.read(other))


@pytest.mark.parametrize(
    ("name", "least", "scope_least"),
    [("gr00t-n1.5", 0.62, 0.72), ("gr00t-n1.5-libero", 0.75, 0.72)],
)
def test_full_size_reduction_counts_the_whole_checkpoint(
    name: str, least: float, scope_least: float, omega_recipe: Recipe
) -> None:
    """32 embodiments in 16 bits are 634 MB of 4.83 GB; one of them is 23 MB."""
    report = predict(stream_policy(f"random:{name}"), omega_recipe)
    assert report["reference_bytes"] == 2 * 2_413_522_880
    assert report["reduction"] >= least
    assert report["paper_scope_reduction"] is not None
    assert report["paper_scope_reduction"] >= scope_least


def test_injected_outliers_leave_the_function_as_it_is(
    small_gr00t: Gr00tN15Policy, few: Observations
) -> None:
    injected = outlier_injected(small_gr00t, 30.0, probe=few[0])
    before, after = (dict(p.module.named_parameters()) for p in (small_gr00t, injected))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("norm1.linear.weight") for name in changed)
    assert any(name.endswith("input_layernorm.weight") for name in changed)
