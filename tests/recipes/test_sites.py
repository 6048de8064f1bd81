"""What a recipe says of single sites: which they are, what changes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import RecipeError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import sites_of
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.quantization.pipeline import planned_sites
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.description import kept_linears
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.prediction import predict

EIGHT = {"activations": {"bits": 8, "clip": 1.0}}


def changed(recipe: Recipe, sites: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(), "sites": sites})


def test_a_change_is_for_the_sites_it_names_and_those_alone(
    omega_recipe: Recipe, small_policy: Pi05Policy
) -> None:
    recipe = changed(
        omega_recipe, {"down_proj": EIGHT, r"layers\.1\.mlp\.down_proj": {"weights": {"group": 32}}}
    )
    for site in sites_of(small_policy):
        before, after = omega_recipe.scheme_of(site), recipe.scheme_of(site)
        assert before is not None and after is not None
        if not site.name.endswith("down_proj"):
            assert after == before
            continue
        assert after.activations.bits == 8 and after.activations.clip == 1.0
        assert after.activations.subtract_mean == before.activations.subtract_mean
        assert after.transform == before.transform
        # The second pattern is applied to what the first came to.
        assert after.weights.group == (32 if "layers.1." in site.name else None)


def test_a_changed_recipe_is_quantized_saved_and_loaded_as_written(
    omega_recipe: Recipe,
    small_policy: Pi05Policy,
    few: Observations,
    noise: np.ndarray,
    tmp_path: Path,
) -> None:
    recipe = changed(omega_recipe, {"(down|o)_proj": EIGHT, r"fc2": None})
    made = oq.quantize(small_policy, few, recipe)
    assert isinstance(made, QuantizedPolicy)
    bits = {record.name: record.activation_bits for record in made.sites}
    kept = kept_linears(sites_of(small_policy), recipe)
    assert kept and all(name.endswith("fc2") for name in kept)
    for name, found in bits.items():
        assert found == (8 if name.endswith(("down_proj", "o_proj")) else 4)
        assert not name.endswith("fc2")
    loaded = oq.load(made.save_pretrained(tmp_path / "artifact"))
    assert np.array_equal(loaded.sample_actions(few[0], noise), made.sample_actions(few[0], noise))
    assert loaded.memory_report() == predict(small_policy, recipe)
    assert "sites fc2" in recipe.left_in_16_bits


def test_eight_bits_somewhere_are_closer_to_full_precision(
    omega_recipe: Recipe, small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    exact = small_policy.sample_actions(few[0], noise)
    errors = [
        np.square(oq.quantize(small_policy, few, recipe).sample_actions(few[0], noise) - exact)
        for recipe in (omega_recipe, changed(omega_recipe, {".*": EIGHT}))
    ]
    assert errors[1].mean() < 0.5 * errors[0].mean()


def test_a_pattern_that_matches_nothing_is_refused(
    omega_recipe: Recipe, small_policy: Pi05Policy, few: Observations
) -> None:
    recipe = changed(omega_recipe, {"down_projection": EIGHT})
    with pytest.raises(RecipeError, match=r"'down_projection' under sites matches no .*down_proj"):
        oq.quantize(small_policy, few, recipe)
    with pytest.raises(RecipeError, match="down_projection"):
        planned_sites(small_policy, recipe)


def test_a_pattern_for_a_part_of_a_site_is_refused(
    omega_recipe: Recipe, small_policy: Pi05Policy
) -> None:
    with pytest.raises(RecipeError, match="share their input with the other linears"):
        planned_sites(small_policy, changed(omega_recipe, {"v_proj": EIGHT}))
    both = changed(omega_recipe, {"(q|k|v)_proj": EIGHT})
    named = changed(omega_recipe, {"qkv_proj": EIGHT})
    fused = [site for site in sites_of(small_policy) if site.name.endswith("qkv_proj")]
    assert fused and all(both.scheme_of(site) == named.scheme_of(site) for site in fused)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"(": {}}, "no regular expression"),
        ({"down_proj": {"activations": {"bit": 8}}}, "bit"),
        ({"down_proj": {"activations": {"bits": 5}}}, "bits"),
        ({"down_proj": {"layers": "mlp"}}, "layers"),
        ({"down_proj": {"weights": {"rounding": "nearest", "rounding_noise": 1}}}, "GPTQ"),
    ],
)
def test_a_change_that_gives_no_scheme_is_refused(
    omega_recipe: Recipe, sites: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(omega_recipe, sites)


def test_recipes_without_changes_keep_their_hash(omega_recipe: Recipe) -> None:
    assert changed(omega_recipe, {}).content_hash == omega_recipe.content_hash
    assert changed(omega_recipe, {".*": EIGHT}).content_hash != omega_recipe.content_hash


class Attention(nn.Module):
    """Three linears that read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.v(x)


def sample(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    return module(observation["x"])


def test_in_a_users_module_a_changed_linear_is_a_site_of_its_own(omega_recipe: Recipe) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [{"x": torch.randn(8, 64, generator=generator)} for _ in range(3)]
    policy = oq.TorchPolicy(Attention(), backbone="q|k|v", sample=sample)
    made = oq.quantize(policy, inputs, changed(omega_recipe, {"v": EIGHT}))
    assert isinstance(made, QuantizedPolicy)
    assert {record.linears: record.activation_bits for record in made.sites} == {
        ("q", "k"): 4,
        ("v",): 8,
    }
