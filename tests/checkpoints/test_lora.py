"""LoRA adapters: peft's own sums, both sides checked, and directories as lerobot-train writes them.

Tolerance.  peft multiplies, scales and adds, here it is one fused sum; both in float32: 1e-6 of
weights of size 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import robot_observation
from lora_cases import CASES, PREFIX, base_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla.checkpoints.lerobot_pipelines import without_prefix
from omega_qvla.checkpoints.lora import fold, read_adapter
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import read_file
from omega_qvla.checkpoints.weight_store import MappedWeights
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.policies.full_precision import load_policy, stream_policy

GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "lora.safetensors"
ROOT = "base_model.model."
Q = "expert.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that peft saved and merged, and its configurations by case."""
    with safe_open(GOLDEN, framework="pt") as file:
        configurations = json.loads(file.metadata()["configurations"])
    return load_file(GOLDEN), configurations


Golden = tuple[dict[str, Tensor], dict[str, str]]


def write_case(directory: Path, case: str, golden: Golden) -> dict[str, Tensor]:
    """The adapter of a case as peft saved it, and its base; returns what peft merged."""
    tensors, configurations = golden
    directory.mkdir()
    adapter = {k.split("/", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{case}/adapter")}
    save_file(adapter, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(configurations[case])
    base = {name: torch.from_numpy(value) for name, value in base_weights().items()}
    save_file(base, directory / "base.safetensors")
    return {k.split("/", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{case}/merged")}


def folded(directory: Path) -> MappedWeights:
    base = without_prefix(read_file(directory / "base.safetensors"), PREFIX)
    stored = fold(base, read_adapter(directory), PREFIX)
    return MappedWeights(stored.places, stored.changes)


@pytest.mark.parametrize("case", CASES)
def test_the_sum_is_the_one_peft_merges(case: str, golden: Golden, tmp_path: Path) -> None:
    merged = write_case(tmp_path / "lora", case, golden)
    store = folded(tmp_path / "lora")
    assert len(merged) >= 2
    for name, before in base_weights().items():
        expected = merged.get(name, torch.from_numpy(before))
        found = store.read(name.removeprefix(PREFIX))
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=0.0, atol=1e-6), name


def test_the_halves_of_the_sum_may_be_of_any_float_type(golden: Golden, tmp_path: Path) -> None:
    """The sum is float32 of what is stored, and it is not rounded to the type of the base."""
    write_case(tmp_path / "lora", "plain", golden)
    for name in ("adapter_model.safetensors", "base.safetensors"):
        path = tmp_path / "lora" / name
        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    base = load_file(tmp_path / "lora" / "base.safetensors")[f"{PREFIX}{Q}.weight"].float()
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    up, down = (adapter[f"{ROOT}{PREFIX}{Q}.lora_{k}.weight"].float() for k in "BA")
    found = folded(tmp_path / "lora").read(f"{Q}.weight")
    assert torch.allclose(found, base + 2.0 * (up @ down), atol=1e-6)
    assert not torch.equal(found, found.bfloat16().float())


def change(directory: Path, name: str, changes: Callable[[dict[str, Any]], object]) -> None:
    path = directory / name
    if name.endswith(".json"):
        content = json.loads(path.read_text())
        changes(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        changes(tensors)
        save_file(tensors, path)


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP = (f"{ROOT}{PREFIX}{Q}.lora_{kind}.weight" for kind in "AB")


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        (CONFIG, {"peft_type": "LOHA"}, "type 'LOHA' is not folded"),
        (CONFIG, {"use_qalora": True}, "does not fold: use_qalora = True"),
        (CONFIG, {"a_later_variant": {"x": 1}}, "does not fold: a_later_variant"),
        (CONFIG, {"layers_to_transform": [0]}, "does not fold: layers_to_transform"),
        (CONFIG, {"trainable_token_indices": [3]}, "does not fold: trainable_token_indices"),
        (CONFIG, {"init_lora_weights": "pissa"}, "(?s)init_lora_weights"),
        (CONFIG, {"fan_in_fan_out": True}, "(?s)fan_in_fan_out"),
        (CONFIG, {"r": 0}, "(?s)not a LoRA that this version folds.*r"),
        (CONFIG, {"lora_alpha": float("nan")}, "(?s)lora_alpha"),
        (CONFIG, {"target_modules": "(q_proj"}, "not a LoRA that this version folds"),
        (CONFIG, {"target_modules": None}, "(?s)target_modules"),
        (CONFIG, {"r": 5}, r"lora_A\.weight has shape \[4, 6\], .* need \[5, 6\]"),
        (CONFIG, {"use_dora": True}, "has no .*lora_magnitude_vector"),
        (CONFIG, {"lora_bias": True}, r"has no .*lora_B\.bias"),
        (CONFIG, {"bias": "all"}, r"action_in_proj\.bias was trained .* does not have it"),
        (CONFIG, {"modules_to_save": ["action_out_proj"]}, r"action_out_proj\.\w+ was trained"),
        (CONFIG, {"target_modules": ["q_proj"]}, "does not target that module"),
        (CONFIG, {"target_modules": ["q_proj", "v_proj"]}, "does not target that module"),
        (
            CONFIG,
            {"target_modules": ["q_proj", "v_proj", "action_in_proj"]},
            r"targets tower\.layers\.0\.self_attn\.q_proj, of which .* has no matrices",
        ),
        (TENSORS, {DOWN: None}, r"has no .*q_proj\.lora_A\.weight"),
        (TENSORS, {DOWN: None, UP: None}, rf"targets {Q}, of which"),
        (TENSORS, {DOWN: torch.zeros(4, 11)}, r"q_proj\.lora_A\.weight has shape \[4, 11\]"),
        (TENSORS, {DOWN: torch.zeros(4, 12, dtype=torch.int8)}, r"torch\.int8.* no tensor of a"),
        (TENSORS, {"x.lora_A.weight": torch.zeros(2)}, "no tensor of a LoRA"),
        (TENSORS, {f"{ROOT}y": torch.zeros(2)}, r"y does not begin with model\."),
        (TENSORS, {f"{ROOT}{PREFIX}z.lora_A.weight": torch.zeros(4, 2)}, "has no such module"),
        (TENSORS, {f"{ROOT}{PREFIX}z.weight": torch.zeros(4, 2)}, "which .* does not have"),
        (
            TENSORS,
            {f"{ROOT}{PREFIX}action_out_proj.weight": torch.zeros(6, 12)},
            r"does not announce \(modules_to_save, bias\)",
        ),
        (TENSORS, {f"{ROOT}{PREFIX}{Q}.lora_B.bias": torch.zeros(16)}, "has an unexpected"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    file: str, changes: dict[str, Any], expected: str, golden: Golden, tmp_path: Path
) -> None:
    write_case(tmp_path / "lora", "plain", golden)

    def apply(content: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is None and file == TENSORS:
                del content[key]
            else:
                content[key] = value

    change(tmp_path / "lora", file, apply)
    with pytest.raises((PolicyError, NonFiniteError), match=expected):
        folded(tmp_path / "lora")


def test_an_adapter_that_is_not_finite_is_refused_before_any_work(
    golden: Golden, tmp_path: Path
) -> None:
    write_case(tmp_path / "lora", "plain", golden)
    broken = {DOWN: torch.full((4, 12), torch.nan)}
    change(tmp_path / "lora", TENSORS, lambda tensors: tensors.update(broken))
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_A\.weight of .* has NaN or Inf"):
        read_adapter(tmp_path / "lora")


# --- directories as lerobot-train writes them -------------------------------------------------

EXPERT = "paligemma_with_expert.gemma_expert.model.layers"
PROJ = f"{EXPERT}.1.self_attn.v_proj"


@pytest.fixture
def lora_directory(lerobot_directory: Callable[..., Path]) -> Callable[[], tuple[Path, Path]]:
    """A fine-tune and its base: other statistics, one linear and the action projection adapted."""

    def write() -> tuple[Path, Path]:
        base = lerobot_directory("base")
        tuned = lerobot_directory("tuned", use_peft=True, pretrained_path=str(base))
        weights = load_file(tuned / "model.safetensors")
        (tuned / "model.safetensors").unlink()
        source, tensors = torch.Generator().manual_seed(3), {}
        for path in (PROJ, "action_out_proj"):
            outputs, inputs = weights[f"model.{path}.weight"].shape
            for kind, shape in (("A", (2, inputs)), ("B", (outputs, 2))):
                key = f"{ROOT}model.{path}.lora_{kind}.weight"
                tensors[key] = torch.empty(shape).normal_(0.0, 0.3, generator=source)
        save_file(tensors, tuned / TENSORS)
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2"}
        settings |= {"base_model_name_or_path": str(base), "revision": None, "modules_to_save": []}
        settings["target_modules"] = (
            r".*expert\.model\.layers\.1\.self_attn\.v_proj|model\.action_out_proj"
        )
        (tuned / CONFIG).write_text(json.dumps(settings))
        return tuned, base

    return write


def merge(tuned: Path, base: Path) -> None:
    """Write whole weights in place of the adapter, as a user who followed peft's advice does."""
    weights, adapter = load_file(base / "model.safetensors"), load_file(tuned / TENSORS)
    for path in (PROJ, "action_out_proj"):
        up, down = (adapter[f"{ROOT}model.{path}.lora_{kind}.weight"] for kind in "BA")
        name = f"model.{path}.weight"
        weights[name] = weights[name].float() + 3.0 * (up @ down)
    save_file(weights, tuned / "model.safetensors")
    for file in (CONFIG, TENSORS):
        (tuned / file).unlink()


def test_an_adapter_and_its_base_are_the_merged_policy(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    tuned, base = lora_directory()
    apart, plain = load_policy(tuned), load_policy(base)
    merge(tuned, base)
    whole = load_policy(tuned)
    for name, parameter in whole.module.named_parameters():
        found = apart.module.get_parameter(name)
        assert torch.allclose(found, parameter, rtol=0.0, atol=1e-6), name
        assert torch.equal(found, plain.module.get_parameter(name)) == (
            name not in (f"{PROJ}.weight", "action_out_proj.weight")
        )
    observation, noise = robot_observation(("front", "wrist")), np.ones((4, 8), np.float32)
    first, second, third = (p.sample_actions(observation, noise) for p in (apart, whole, plain))
    assert np.allclose(first, second, atol=1e-5) and not np.allclose(first, third, atol=0.1)


def test_what_was_done_with_an_adapter_is_recorded(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    tuned, base = lora_directory()
    expected = "LoRA of rank 2, alpha 6, folded into 2 modules in float32 and not rounded; base "
    assert stream_policy(tuned).decisions["adapter"] == f"{expected}{base}"
    merge(tuned, base)
    assert stream_policy(tuned).decisions["adapter"].startswith("merged: whole weights")
    assert "adapter" not in stream_policy(base).decisions


def test_everything_but_the_weights_is_the_fine_tunes_own(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    """LeRobot reads config.json and the pipelines where the adapter is; the base needs none."""
    tuned, base = lora_directory()
    for path in base.iterdir():
        if path.name != "model.safetensors":
            path.unlink()
    assert load_policy(tuned).config.horizon == 4


def test_the_base_may_be_named_where_it_lies_now(
    lora_directory: Callable[[], tuple[Path, Path]], tmp_path: Path
) -> None:
    tuned, base = lora_directory()
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(PolicyError, match="no directory here; give --base DIR"):
        stream_policy(tuned)
    assert (
        stream_policy(tuned, CheckpointOptions(base=str(moved)))
        .decisions["adapter"]
        .endswith(str(moved))
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"base_model_name_or_path": None}, "does not name the base"),
        ({"base_model_name_or_path": "lerobot/pi05_base"}, "lerobot/pi05_base@<commit>"),
        ({"base_model_name_or_path": "lerobot/pi05_base", "revision": "main"}, "main is a branch"),
    ],
)
def test_a_base_that_is_not_fixed_is_refused(
    settings: dict[str, Any], expected: str, lora_directory: Callable[[], tuple[Path, Path]]
) -> None:
    tuned, _ = lora_directory()
    change(tuned, CONFIG, lambda content: content.update(settings))
    with pytest.raises(PolicyError, match=expected):
        stream_policy(tuned)


def test_a_base_on_the_hub_is_fetched_at_its_revision(
    lora_directory: Callable[[], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, base = lora_directory()
    asked = []
    monkeypatch.setattr(
        "omega_qvla.checkpoints.lerobot_weights.fetch",
        lambda identity: asked.append(identity) or base,
    )
    named = {"base_model_name_or_path": "me/base", "revision": "v2"}
    change(tuned, CONFIG, lambda content: content.update(named))
    assert stream_policy(tuned).decisions["adapter"].endswith("base me/base@v2")
    assert asked == [("me/base", "v2")]


def test_whole_weights_beside_an_adapter_are_refused(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    tuned, base = lora_directory()
    (tuned / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(PolicyError, match="nothing says whether the adapter is merged"):
        stream_policy(tuned)


def test_half_an_adapter_or_none_is_named(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    tuned, base = lora_directory()
    with pytest.raises(PolicyError, match="--base is for LoRA adapters"):
        stream_policy(base, CheckpointOptions(base=str(tuned)))
    (tuned / TENSORS).rename(tuned / "adapter_model.bin")
    with pytest.raises(PolicyError, match=r"adapter_model\.bin: this format runs code"):
        stream_policy(tuned)
    (tuned / "adapter_model.bin").unlink()
    with pytest.raises(PolicyError, match=r"adapter_model\.safetensors"):
        stream_policy(tuned)
    (tuned / CONFIG).unlink()
    with pytest.raises(PolicyError, match=r"neither model\.safetensors"):
        stream_policy(tuned)


def test_an_adapter_without_lerobots_configuration_is_refused(
    lora_directory: Callable[[], tuple[Path, Path]],
) -> None:
    tuned, _ = lora_directory()
    (tuned / "config.json").unlink()
    with pytest.raises(PolicyError, match="folds the adapters of LeRobot's policies"):
        stream_policy(tuned)


def test_an_adapter_to_lerobots_groot_is_folded_too(groot_directory: Callable[..., Path]) -> None:
    """LeRobot up to 0.5.1 adapts GR00T N1.5 as any policy; only the prefix is another."""
    base = groot_directory("base")
    tuned = groot_directory("tuned", use_peft=True)
    (tuned / "model.safetensors").unlink()
    path = "action_head.model.transformer_blocks.1.attn1.to_q"
    before = stream_policy(base)
    assert before.store is not None
    outputs, inputs = before.store.read(f"{path}.weight").shape
    source = torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=source) for shape in ((2, inputs), (outputs, 2)))
    root = f"{ROOT}_groot_model.{path}.lora_"
    save_file({f"{root}A.weight": down, f"{root}B.weight": up}, tuned / TENSORS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1}
    settings |= {"base_model_name_or_path": str(base), "target_modules": [path]}
    (tuned / CONFIG).write_text(json.dumps(settings))
    after = stream_policy(tuned)
    assert after.store is not None
    expected = before.store.read(f"{path}.weight") + 0.5 * (up @ down)
    assert torch.allclose(after.store.read(f"{path}.weight"), expected, atol=1e-6)
    assert "folded into 1 module in float32" in after.decisions["adapter"]
    assert after.store.dtype(f"{path}.weight") == torch.float32
    assert after.store.dtype(f"{path}.bias") == torch.bfloat16
