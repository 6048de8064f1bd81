"""Quantized policies as wholes: saved, loaded, measured, run."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.artifact import read_artifact, write_artifact
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import (
    ArtifactError,
    NotAnArtifactError,
    NotRealizableError,
    OmegaError,
    PolicyError,
    ResourceError,
)
from omega_qvla.flow_time import euler_times
from omega_qvla.policies.base import linears_of, sites_of
from omega_qvla.policies.pi05.checkpoints.openpi import write_openpi
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.linear import QuantizedLinear
from omega_qvla.runtime.prediction import predict
from omega_qvla.runtime.token_embedding import QuantizedEmbedding

pytestmark = pytest.mark.long

LANGUAGE = "paligemma_with_expert.paligemma.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert.model"
SITE = f"{EXPERT}.layers.0.self_attn.qkv_proj"
EMBEDDING = f"{LANGUAGE}.embed_tokens"


@pytest.fixture(scope="module")
def quantized(small_policy: Pi05Policy, few: Observations) -> QuantizedPolicy:
    result = oq.quantize(small_policy, few, "omega-w4a4-static")
    assert isinstance(result, QuantizedPolicy)
    return result


@pytest.fixture(scope="module")
def saved(quantized: QuantizedPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_pretrained(tmp_path_factory.mktemp("engine") / "artifact")


def tensors_reachable_from(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in attributes, containers and closures, modules and plain objects alike."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type | str | bytes | int | float):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_reachable_from(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_reachable_from(item, seen)
    else:
        owner = getattr(value, "__self__", None)
        if owner is not None:
            yield from tensors_reachable_from(owner, seen)
        for cell in getattr(value, "__closure__", None) or ():
            yield from tensors_reachable_from(cell.cell_contents, seen)
        yield from tensors_reachable_from(getattr(value, "__dict__", {}), seen)


def test_the_round_trip_gives_the_same_actions_bit_for_bit_every_time(
    quantized: QuantizedPolicy, saved: Path, few: Observations, noise: np.ndarray
) -> None:
    expected = [quantized.sample_actions(item, noise) for item in few]
    for _ in range(2):
        loaded = oq.load(saved)
        for item, chunk in zip(few, expected, strict=True):
            assert np.array_equal(loaded.sample_actions(item, noise), chunk)
        assert chunk.dtype == np.float32 and chunk.shape == (4, 4)


def test_a_loaded_policy_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    oq.load(saved).save_pretrained(tmp_path / "copy")
    for file in saved.rglob("*"):
        if file.is_file():
            assert (tmp_path / "copy" / file.relative_to(saved)).read_bytes() == file.read_bytes()


def test_loading_needs_no_full_precision_checkpoint(
    small_policy: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    write_openpi(small_policy, tmp_path / "full")
    policy = oq.load_policy(tmp_path / "full")
    result = oq.quantize(policy, few, "rtn")
    result.save_pretrained(tmp_path / "small")
    expected = result.sample_actions(few[0], noise)
    del policy, result
    shutil.rmtree(tmp_path / "full")
    assert np.array_equal(oq.load(tmp_path / "small").sample_actions(few[0], noise), expected)


@pytest.mark.parametrize("fresh", [True, False])
def test_no_floating_point_copy_of_a_quantized_weight_exists(
    fresh: bool, quantized: QuantizedPolicy, saved: Path, small_policy: Pi05Policy
) -> None:
    """Of all tensors reachable from the policy, none floating has a weight's shape or numbers.

    Transforms [K/64, 64, 64] and the step table are floating point and may have as many numbers as
    a weight of this small policy, so shapes are compared; two-dimensional ones only, since a weight
    has two dimensions.
    """
    policy = quantized if fresh else oq.load(saved)
    shapes, pointers = set(), set()
    for site in sites_of(small_policy):
        linears = linears_of(small_policy.module, site)
        width = linears[0].in_features
        padded = -(-width // 64) * 64
        for rows in {sum(x.out_features for x in linears), *(x.out_features for x in linears)}:
            shapes |= {(rows, width), (rows, padded), (width, rows), (padded, rows)}
        pointers |= {x.weight.untyped_storage().data_ptr() for x in linears}
    shapes.add(tuple(small_policy.module.embed_tokens.weight.shape))
    gc.collect()
    found = list(tensors_reachable_from(policy))
    names = {id(p): n for n, p in policy.policy.module.named_parameters()}
    floating = [t for t in found if t.is_floating_point()]
    copies = [t for t in floating if tuple(t.shape) in shapes]
    outer = ("action_in_proj", "position_embedding")  # small, and not quantized
    assert all(any(o in names.get(id(t), "") for o in outer) for t in copies)
    assert not pointers & {t.untyped_storage().data_ptr() for t in floating}
    modules = list(policy.policy.module.modules())
    assert sum(isinstance(m, QuantizedLinear) for m in modules) == 18
    left = {n for n, m in policy.policy.module.named_modules() if isinstance(m, nn.Linear)}
    assert left == {"action_in_proj", "action_out_proj"}


def test_a_simulation_refuses_to_be_saved_and_says_why(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    simulated = oq.quantize(small_policy, few, "omega-paper")
    assert isinstance(simulated, SimulatedPolicy)
    with pytest.raises(NotRealizableError, match=r"omega-paper.*input channel.*rotates its output"):
        simulated.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert simulated.resident_bytes() > 0


def test_the_integers_come_close_to_the_full_precision_policy(
    quantized: QuantizedPolicy, small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    """Random weights quantize badly; a tenth of the actions' size is far from unrelated chunks."""
    exact = np.stack([small_policy.sample_actions(o, noise) for o in few])
    ours = np.stack([quantized.sample_actions(o, noise) for o in few])
    assert np.sqrt(np.square(ours - exact).mean()) < 0.1 * np.sqrt(np.square(exact).mean())


@pytest.mark.parametrize("recipe", ["rtn", "omega-w4a4-static", "omega-w4a4-no-prior"])
@pytest.mark.parametrize("scope", ["all", "paper"])
def test_the_predicted_memory_is_the_real_one_and_sums_to_the_tensors(
    recipe: str, scope: Any, small_policy: Pi05Policy, few: Observations
) -> None:
    result = oq.quantize(small_policy, few, recipe, scope=scope)
    report = result.memory_report()
    assert report == predict(small_policy, Recipe.load(recipe).scoped(scope))
    total = sum(tensor.nbytes for tensor in result.tensors().values())
    assert report["total_bytes"] == total == result.resident_bytes()
    assert sum(row["bytes"] for row in report["components"]) == total


def test_odd_recipes_are_predicted_too(small_policy: Pi05Policy, few: Observations) -> None:
    scheme = {
        "transform": {"rotation": "hadamard", "permutation": "snake", "block": 16},
        "weights": {"bits": 8, "rounding": "nearest", "group": 48},
        "activations": {"bits": 8, "scale": "per_step"},
    }
    plain = {"transform": {"rotation": "none"}, "weights": {"bits": 4, "group": 24}}
    recipe = Recipe.model_validate(
        {"name": "odd", "description": "", "vision": plain, "action_head": scheme}
    )
    result = oq.quantize(small_policy, few, recipe)
    assert result.memory_report() == predict(small_policy, recipe)


def test_a_bfloat16_checkpoint_is_predicted_and_stored_in_16_bits(
    policy: Pi05Policy, few: Observations, omega_recipe: Recipe, tmp_path: Path
) -> None:
    for parameter in policy.module.parameters():
        parameter.copy_(parameter.bfloat16().float())
    result = oq.quantize(policy, few, omega_recipe)
    assert result.memory_report() == predict(policy, omega_recipe)
    assert result.tensors()["action_in_proj.weight"].dtype == torch.bfloat16
    result.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out")
    assert loaded.policy.module.get_parameter("action_in_proj.weight").dtype == torch.float32
    assert loaded.memory_report() == result.memory_report()


def test_permutation_and_eight_bits_survive_the_round_trip(
    small_policy: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    """At 8 bits and with one group per 48 channels the actions are those of full precision."""
    scheme = {
        "transform": {"permutation": "snake", "block": 16},
        "weights": {"bits": 8, "group": 48},
        "activations": {"bits": 8},
    }
    content = {"name": "eight", "description": "", "backbone": scheme, "action_head": scheme}
    result = oq.quantize(small_policy, few, Recipe.model_validate(content))
    result.save_pretrained(tmp_path / "out")
    chunk = oq.load(tmp_path / "out").sample_actions(few[0], noise)
    assert np.array_equal(chunk, result.sample_actions(few[0], noise))
    exact = small_policy.sample_actions(few[0], noise)
    assert np.abs(chunk - exact).max() < 0.02 * np.abs(exact).max()


def test_paper_scope_leaves_everything_else_as_it_is(
    small_policy: Pi05Policy, few: Observations, tmp_path: Path
) -> None:
    result = oq.quantize(small_policy, few, scope="paper")
    before = small_policy.module.state_dict()
    kept = {n: t for n, t in result.policy.module.state_dict().items() if n in before}
    for part in ("vision_tower", "multi_modal_projector", "embed_tokens", ".dense.", "time_mlp"):
        names = [name for name in before if part in name]
        assert names and all(torch.equal(kept[name], before[name]) for name in names)
    result.save_pretrained(tmp_path / "out")
    rows = {row["name"]: row for row in oq.load(tmp_path / "out").memory_report()["components"]}
    assert rows["backbone"]["bytes"] < rows["backbone"]["reference_bytes"]
    assert rows["vision"]["bytes"] == 2 * rows["vision"]["reference_bytes"]  # float32 here


@pytest.mark.parametrize(("bits", "dtype", "columns"), [(8, torch.int8, 1), (4, torch.int32, 64)])
def test_the_embedding_is_integers_within_half_a_step_of_what_is_not_clipped(
    small_policy: Pi05Policy,
    few: Observations,
    tmp_path: Path,
    bits: int,
    dtype: torch.dtype,
    columns: int,
) -> None:
    recipe = Recipe.load("rtn").model_copy(update={"embedding_bits": bits})
    oq.quantize(small_policy, few, recipe).save_pretrained(tmp_path / "out")
    embedding = oq.load(tmp_path / "out").policy.module.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding) and embedding.weight.dtype == dtype
    exact = small_policy.module.embed_tokens.weight
    found = embedding(torch.arange(exact.shape[0]))
    scale = embedding.weight_scale.float().reshape(exact.shape[0], -1)
    step = scale if columns == 1 else scale.repeat_interleave(columns, 1)[:, : exact.shape[1]]
    inside = exact.abs() <= (2 ** (bits - 1) - 1) * step
    assert inside.float().mean() > 0.8
    assert bool(((found - exact).abs() <= 0.5001 * step)[inside].all())
    assert embedding(torch.zeros((2, 3), dtype=torch.int64)).shape == (2, 3, exact.shape[1])


def test_the_step_table_is_exact_at_its_counts_and_close_between(
    quantized: QuantizedPolicy, small_policy: Pi05Policy
) -> None:
    """Exact up to summation order, 1e-5.  Random weights follow the fast sines of t that training
    would damp, so between the times only the bound of linear interpolation is asked for: the two
    neighbours enclose the value up to the curvature there.
    """
    for steps in (4, 5, 8, 10, 16):
        exact, found = small_policy.schedule(steps), quantized.policy.schedule(steps)
        assert (exact - found).abs().max() < 1e-5
    table = quantized.policy.step_table
    assert table is not None
    for steps in (3, 7):
        found = table.at(torch.tensor(euler_times(steps)))
        for time, row in zip(euler_times(steps), found, strict=True):
            above = int((table.times >= time - 1e-6).sum()) - 1
            below = min(above + 1, len(table.times) - 1)
            low = torch.minimum(table.values[above], table.values[below])
            high = torch.maximum(table.values[above], table.values[below])
            assert bool(((row >= low - 1e-5) & (row <= high + 1e-5)).all())


def test_a_smooth_modulation_is_interpolated_with_small_error(policy: Pi05Policy) -> None:
    table = type(policy.tabulate_modulation([4])).tabulate(
        lambda t: torch.sin(3 * t.double()).float().view(-1, 1, 1, 1), (4, 5, 8, 10, 16)
    )
    for steps in (3, 7):
        times = torch.tensor(euler_times(steps))
        found = table.at(times).flatten()
        # Linear interpolation over gaps of at most 1/16: h²/8 · max |f''| = 9/2048.
        assert (found - torch.sin(3 * times)).abs().max() < 9 / 2048


@pytest.mark.parametrize("steps", [1, 3, 7, 25])
def test_other_numbers_of_steps_run_with_interpolated_scales(
    steps: int,
    quantized: QuantizedPolicy,
    saved: Path,
    few: Observations,
    noise: np.ndarray,
) -> None:
    chunk = quantized.sample_actions(few[0], noise, steps=steps)
    assert np.isfinite(chunk).all()
    assert np.array_equal(oq.load(saved).sample_actions(few[0], noise, steps=steps), chunk)


def test_per_step_scales_are_stored_with_their_times(quantized: QuantizedPolicy) -> None:
    tensors = quantized.tensors()
    assert tensors[f"{SITE}.activation_step_times"].tolist() == [1.0, 0.75, 0.5, 0.25]
    assert tensors[f"{SITE}.activation_scale"].shape == (4,)
    assert f"{LANGUAGE}.layers.0.mlp.down_proj.activation_scale" not in tensors


Change = Callable[[dict[str, Tensor]], Any]


def rewritten(saved: Path, target: Path, change: Change, **config: Any) -> Path:
    """The same artifact with other tensors, valid in itself."""
    artifact = read_artifact(saved)
    tensors = {name: tensor.clone() for name, tensor in artifact.tensors.items()}
    change(tensors)
    write_artifact(
        target,
        config={**artifact.config, **config},
        tensors=tensors,
        processor=artifact.processor,
        card="",
    )
    return target


@pytest.mark.parametrize(
    "name",
    [
        f"{SITE}.weight_packed",
        f"{SITE}.weight_scale",
        f"{SITE}.weight_shape",
        f"{SITE}.transform",
        f"{SITE}.activation_scale",
        f"{SITE}.activation_step_times",
        f"{EMBEDDING}.weight",
        f"{EMBEDDING}.weight_scale",
        "action_in_proj.weight",
        "step_table.times",
        "step_table.values",
        f"{LANGUAGE}.layers.0.input_layernorm.weight",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "misshaped", "mistyped"])
def test_a_missing_misshaped_or_mistyped_tensor_is_refused_by_name(
    name: str, damage: str, saved: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        if damage == "misshaped":
            tensors[name] = torch.cat((tensor, tensor))
        elif damage == "mistyped":
            floating = tensor.is_floating_point()
            tensors[name] = tensor.to(torch.int16 if floating else torch.float64)

    directory = rewritten(saved, tmp_path / "bad", change)
    with pytest.raises(ArtifactError) as caught:
        oq.load(directory)
    assert name in str(caught.value) or name.rpartition(".")[0] in str(caught.value)


def add(name: str) -> Change:
    return lambda tensors: tensors.__setitem__(name, torch.ones(2))


@pytest.mark.parametrize("name", [f"{SITE}.bias", f"{SITE}.other", "stranger"])
def test_an_extra_tensor_is_refused_by_name(name: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=name):
        oq.load(rewritten(saved, tmp_path / "bad", add(name)))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("activation_scale", torch.zeros(4)),
        ("activation_step_times", torch.tensor([1.0, 0.5, 0.75, 0.25])),
    ],
)
def test_scales_that_cannot_be_used_are_refused(
    kind: str, value: Tensor, saved: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{SITE}.{kind}"] = value

    with pytest.raises(ArtifactError, match=SITE):
        oq.load(rewritten(saved, tmp_path / "bad", change))


@pytest.mark.parametrize(
    "config",
    [
        {"sites": []},
        {"sites": None},
        {"sites": [{}]},
        {"policy": {"family": "pi05", "config": {}}},
        {"policy": {"family": "other", "config": {}}},
        {"policy": None},
        {"recipe": {"name": "x"}},
        {"embedding": {"path": "nowhere"}},
        {"adaptive_norm": "keep"},
    ],
)
def test_a_configuration_that_does_not_fit_is_one_clear_error(
    config: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    directory = rewritten(saved, tmp_path / "bad", lambda _: None, **config)
    with pytest.raises(OmegaError):
        oq.load(directory)


def test_other_devices_and_other_directories_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cuda"):
        oq.load(saved, device="cuda")
    with pytest.raises(NotAnArtifactError):
        oq.load(tmp_path)
    with pytest.raises(PolicyError, match=r"quantized artifact.*omega_qvla\.load"):
        oq.load_policy(saved)
