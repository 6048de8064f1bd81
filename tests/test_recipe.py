"""Recipes are strict, frozen, hashable values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from omega_qvla.errors import RecipeError
from omega_qvla.recipe import Recipe, TransformScheme, recipe_names

NAMES = ["omega-paper", "omega-w4a4", "rtn"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_builtin_recipes_are_known_and_load_under_their_own_name() -> None:
    assert recipe_names() == NAMES
    assert [Recipe.load(name).name for name in NAMES] == NAMES


@pytest.mark.parametrize("name", ["omega-w4a5", "", "../rtn", "rtn.yml.bak"])
def test_an_unknown_recipe_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RecipeError, match=", ".join(NAMES)):
        Recipe.load(name)


def test_a_recipe_can_be_a_file_a_path_or_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "name: mine\ndescription: d\nbackbone: {}\n")
    recipe = Recipe.load(path)
    assert recipe == Recipe.load(str(path)) == Recipe.load(recipe)
    assert recipe.backbone is not None and recipe.action_head is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\ndescription: b\nbackboen: {}\n", "backboen"),
        ("name: a\ndescription: b\nbackbone: {weights: {bit: 4}}\n", r"backbone\.weights\.bit"),
        ("name: a\ndescription: b\nbackbone: {weights: {bits: 3}}\n", r"backbone\.weights\.bits"),
        ("name: a\n", "description"),
        ("name: a\ndescription: b\nobservations: 0\n", "observations"),
        ("name: a\ndescription: b\nseed: -1\n", "seed"),
        ("name: a\ndescription: b\ntable_step_counts: [4, 0]\n", "table_step_counts"),
        ("name: a\ndescription: b\nbackbone: {weights: {damping: .inf}}\n", "damping"),
        ("name: a\ndescription: b\nbackbone: {transform: {balance: .nan}}\n", "balance"),
        ("name: a\ndescription: b\nbackbone: {transform: {block: 48}}\n", "power of two"),
        ("- a\n", "mapping"),
        ("", "mapping"),
        ("a: [\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_an_invalid_file_is_refused_naming_the_field(
    text: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=expected):
        Recipe.load(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"\xff\xfe"), id])
def test_an_unreadable_file_is_refused(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_block_that_is_not_a_power_of_two_is_fine_without_hadamard() -> None:
    assert TransformScheme(rotation="svd", block=48).block == 48


def test_the_hash_depends_on_everything_but_the_description(default_recipe: Recipe) -> None:
    changed = [
        default_recipe.model_copy(update={"seed": 1}),
        default_recipe.model_copy(update={"cascade": not default_recipe.cascade}),
        default_recipe.scoped("paper"),
        *(Recipe.load(name) for name in ("rtn", "omega-paper")),
    ]
    hashes = {recipe.content_hash for recipe in (default_recipe, *changed)}
    assert len(hashes) == 1 + len(changed)
    described = default_recipe.model_copy(update={"description": "other words"})
    assert described.content_hash == default_recipe.content_hash
    again = Recipe.model_validate(default_recipe.model_dump(mode="json"))
    assert again == default_recipe and again.content_hash == default_recipe.content_hash


def test_only_the_papers_recipe_is_a_simulation() -> None:
    assert {name: Recipe.load(name).realizable for name in NAMES} == {
        "omega-paper": False,
        "omega-w4a4": True,
        "rtn": True,
    }


@pytest.mark.parametrize(
    "scheme",
    [
        {"activations": {"scale": "per_channel_per_step"}},
        {"transform": {"output_rotation": True}},
    ],
)
def test_scales_per_channel_and_rotated_outputs_cannot_be_integers(scheme: dict[str, Any]) -> None:
    content = {"name": "x", "description": "", "projector": scheme}
    assert not Recipe.model_validate(content).realizable


def test_paper_scope_keeps_backbone_and_action_head_alone(default_recipe: Recipe) -> None:
    paper = default_recipe.scoped("paper")
    assert paper.backbone == default_recipe.backbone
    assert paper.action_head == default_recipe.action_head
    assert paper.vision is None and paper.projector is None
    assert paper.adaptive_norm == "keep" and paper.embedding_bits == 16
    assert default_recipe.scoped("all") is default_recipe


def test_recipes_cannot_be_changed(default_recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        default_recipe.seed = 3


@pytest.mark.parametrize(
    ("component", "per_step", "expected"),
    [
        ("action_head", True, "per_step"),
        ("action_head", False, "per_token"),
        ("vision", False, "per_step"),
    ],
)
def test_a_site_of_the_action_head_that_runs_once_scales_per_token(
    component: str, per_step: bool, expected: str
) -> None:
    static = {"activations": {"scale": "per_step"}}
    recipe = Recipe.model_validate(
        {"name": "r", "description": "", "action_head": static, "vision": static}
    )
    scheme = recipe.scheme_of(SimpleNamespace(component=component, per_step=per_step))
    assert scheme is not None and scheme.activations.scale == expected
    assert recipe.scheme_of(SimpleNamespace(component="backbone", per_step=False)) is None
