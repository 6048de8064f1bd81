"""Recipes are strict, frozen, hashable values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from omega_qvla.errors import RecipeError
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, TransformScheme, ablation_names, recipe_names

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NAMES = [
    "duquant",
    "foldquant",
    "gptq",
    "omega-paper",
    "omega-w4a4",
    "omega-w4a4-no-prior",
    "omega-w4a4-static",
    "omega-w4a8",
    "quantvla",
    "quarot",
    "rtn",
    "smoothquant",
    "svdquant",
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_builtin_recipes_are_known_and_load_under_their_own_name() -> None:
    assert recipe_names() == NAMES
    assert [Recipe.load(name).name for name in NAMES] == NAMES


def test_ablations_differ_from_what_their_name_begins_with_in_one_thing() -> None:
    """Beside name and description, each changes one field, in one or in all components."""
    names = ablation_names()
    assert len(names) == len(set(names)) >= 13 and not set(names) & set(NAMES)
    for name in names:
        recipe = Recipe.load(name)
        assert recipe.name == name and recipe.realizable
        begun = [known for known in (*NAMES, *names) if name.startswith(f"{known}-")]
        changed = Recipe.load(max(begun, key=len))
        fields = {path.rpartition(".")[2] for path in differences(changed, recipe)}
        assert len(fields) == 1, (name, fields)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Dotted paths of the fields in which two recipes differ, name and description apart."""

    def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in content.items():
            path = f"{prefix}{key}"
            found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
        return found

    ours, theirs = (flat(r.model_dump(exclude={"name", "description"})) for r in (one, other))
    return sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))


def test_the_default_and_its_predecessor_are_what_was_measured() -> None:
    """Rows of the committed results carry their hashes."""
    measured = {
        row["recipe"]: row["recipe_hash"]
        for name in ("benchmark-v1", "tiny-pi05-default")
        for row in json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["rows"]
        if "recipe_hash" in row
    }
    names = ("rtn", "omega-paper", "omega-w4a4-static", "omega-w4a4-no-prior", "omega-w4a4")
    assert {name: measured[name] for name in names} == {
        name: Recipe.load(name).content_hash for name in names
    }
    assert DEFAULT_RECIPE == "omega-w4a4"


def test_a_field_at_its_default_is_no_part_of_the_hash() -> None:
    scheme = {"activations": {"scale": "per_token"}}
    named = {**scheme, "weights": {"rounding_noise": 0.0}, "layers": "all"}
    short, long = (
        Recipe.model_validate({"name": "a", "description": "", "backbone": given})
        for given in (scheme, named)
    )
    assert short.content_hash == long.content_hash


def test_the_default_differs_from_its_predecessor_in_its_prior_alone() -> None:
    changed = differences(Recipe.load("omega-w4a4-no-prior"), Recipe.load("omega-w4a4"))
    assert {path.rpartition(".")[2] for path in changed} == {"prior"}


def test_the_eight_bit_recipe_differs_from_the_default_in_its_activations_alone() -> None:
    """The same weights bit for bit: nothing that they are made of looks at these fields."""
    changed = differences(Recipe.load(DEFAULT_RECIPE), Recipe.load("omega-w4a8"))
    assert {path.rpartition(".")[2] for path in changed} == {"bits", "clip"}
    assert all("activations" in path for path in changed)


def test_fields_added_later_are_written_when_they_are_used() -> None:
    svdquant, quantvla = Recipe.load("svdquant"), Recipe.load("quantvla")
    for recipe, field in ((svdquant, "low_rank"), (quantvla, "layers"), (quantvla, "magnitude")):
        assert f"'{field}'" in str(recipe.model_dump(mode="json"))
    assert Recipe.model_validate(quantvla.model_dump(mode="json")) == quantvla


def test_recipes_say_what_they_leave_in_16_bits() -> None:
    assert Recipe.load("omega-w4a4-static").left_in_16_bits == ()
    assert Recipe.load("omega-w4a4-static").scoped("paper").left_in_16_bits == (
        "vision",
        "projector",
        "adaptive norms",
        "token embedding",
    )
    assert "attention of the action head" in Recipe.load("quantvla").left_in_16_bits
    assert "rank-32 branch of the action head" in Recipe.load("svdquant").left_in_16_bits


def test_a_selective_layout_covers_no_attention(omega_recipe: Recipe) -> None:
    head = omega_recipe.action_head
    assert head is not None
    selective = omega_recipe.model_copy(
        update={"action_head": head.model_copy(update={"layers": "mlp"})}
    )
    for attention in (True, False):
        site = SimpleNamespace(component="action_head", per_step=True, attention=attention)
        assert (selective.scheme_of(site) is None) is attention
        assert omega_recipe.scheme_of(site) is not None


def test_matching_attention_that_is_quantized_is_refused() -> None:
    content = {"name": "x", "description": "", "action_head": {}, "match_attention": True}
    with pytest.raises(ValidationError, match="layers: mlp"):
        Recipe.model_validate(content)


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
        ("name: a\ndescription: b\nbackbone: {transform: {smoothing: .nan}}\n", "smoothing"),
        ("name: a\ndescription: b\nbackbone: {transform: {block: 48}}\n", "power of two"),
        ("name: a\ndescription: b\nbackbone: {activations: {clip: best}}\n", "clip"),
        ("name: a\ndescription: b\nbackbone: {activations: {clip: 0}}\n", "clip"),
        ("name: a\ndescription: b\nbackbone: {weights: {rounding_noise: 2}}\n", "rounding_noise"),
        (
            "name: a\ndescription: b\nbackbone:\n"
            "  weights: {rounding: nearest, rounding_noise: 0.1}\n",
            "GPTQ",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n"
            "  activations: {scale: per_step}\n  tokens: equal\n",
            "scales per token",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n"
            "  transform: {rotation: hadamard}\n  weights: {rounding: nearest}\n  tokens: equal\n",
            "needs none",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n  weights: {order: energy, group: 64}\n",
            "give no group",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n  transform: {shrinkage: 0.5}\n",
            "second_moment",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n"
            "  activations: {scale: per_channel_per_step, subtract_mean: true}\n",
            "subtract_mean is for integers",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n  transform: {rotation: none}\n"
            "  weights: {rounding: nearest}\n  prior: contribution\n",
            "prior",
        ),
        (
            "name: a\ndescription: b\nbackbone:\n"
            "  transform: {output_rotation: true}\n  activations: {subtract_mean: true}\n",
            "subtract_mean is for integers",
        ),
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


def test_the_hash_depends_on_everything_but_the_description(omega_recipe: Recipe) -> None:
    changed = [
        omega_recipe.model_copy(update={"seed": 1}),
        omega_recipe.model_copy(update={"cascade": not omega_recipe.cascade}),
        omega_recipe.scoped("paper"),
        *(Recipe.load(name) for name in ("rtn", "omega-paper")),
    ]
    hashes = {recipe.content_hash for recipe in (omega_recipe, *changed)}
    assert len(hashes) == 1 + len(changed)
    described = omega_recipe.model_copy(update={"description": "other words"})
    assert described.content_hash == omega_recipe.content_hash
    again = Recipe.model_validate(omega_recipe.model_dump(mode="json"))
    assert again == omega_recipe and again.content_hash == omega_recipe.content_hash


def test_only_the_papers_recipe_is_a_simulation() -> None:
    assert [name for name in NAMES if not Recipe.load(name).realizable] == ["omega-paper"]


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


def test_paper_scope_keeps_backbone_and_action_head_alone(omega_recipe: Recipe) -> None:
    paper = omega_recipe.scoped("paper")
    assert paper.backbone == omega_recipe.backbone
    assert paper.action_head == omega_recipe.action_head
    assert paper.vision is None and paper.projector is None
    assert paper.adaptive_norm == "keep" and paper.embedding_bits == 16
    assert omega_recipe.scoped("all") is omega_recipe


def test_recipes_cannot_be_changed(omega_recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        omega_recipe.seed = 3


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
