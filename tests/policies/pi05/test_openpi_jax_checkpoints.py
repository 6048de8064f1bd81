"""Steps of openpi's JAX trainer: what is read, how little of it at a time, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openpi_cases import CASES, GOLDEN, STEP
from openpi_parity import choices_of, load
from orbax_steps import full_shapes, write_step

from omega_qvla.checkpoints import orbax_arrays
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax_arrays import SavedArrays
from omega_qvla.errors import MissingPackageError, NonFiniteError, PolicyError
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.paligemma.openpi_training import DROID
from omega_qvla.policies.pi05.config import Pi05Config

FULL, LORA = (next(case for case in CASES if case.name == name) for name in ("full", "lora"))
Q_A = "PaliGemma/llm/layers/attn/q_einsum/lora_a"


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Copies a golden case; its step is below."""

    def copy(name: str = "full") -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


@pytest.fixture
def changed(folder: Callable[..., Path]) -> Callable[..., Path]:
    """A golden case with other arrays: name → array, or None to leave one out."""

    def of_case(name: str = "full", **training: Any) -> Callable[[dict[str, Any]], Path]:
        copied = folder(name)
        text = json.loads((copied / "training.json").read_text()) | training
        (copied / "training.json").write_text(json.dumps(text))

        def of(changes: dict[str, Any]) -> Path:
            step = copied / str(STEP)
            saved = SavedArrays(step)
            found = {n: saved.read(n).float().numpy() for n in saved.headers} | changes
            shutil.rmtree(step / "params")
            write(step, {n: a for n, a in found.items() if a is not None})
            return copied

        return of

    return of_case


def write(step: Path, arrays: dict[str, np.ndarray], **options: Any) -> None:
    """Write a step with these arrays."""
    shapes = {name: array.shape for name, array in arrays.items()}
    write_step(step, shapes, lambda name, shape: arrays[name], **options)


def refused(folder: Path, expected: str) -> None:
    with pytest.raises((PolicyError, NonFiniteError), match=expected) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_are_left_in_the_files_and_are_those_that_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = load(GOLDEN / "full")
    for window in (1, orbax_arrays.WINDOW_BYTES):
        monkeypatch.setattr(orbax_arrays, "WINDOW_BYTES", window)
        streamed = stream_policy(GOLDEN / "full" / str(STEP), choices_of(GOLDEN / "full"))
        assert streamed.store is not None
        for name, parameter in reversed(list(whole.module.named_parameters())):
            assert torch.equal(streamed.store.read(name), parameter)
            assert streamed.store.dtype(name) == torch.float32


def test_what_was_decided_is_told() -> None:
    decisions = load(GOLDEN / "lora").decisions
    assert decisions["layout"] == "openpi, JAX"
    assert decisions["adapter"] == (
        "LoRA folded in float32 and not rounded; backbone: rank 2, attention's product times 3; "
        "expert: rank 4, attention's product times 3"
    )
    assert "adapter" not in load(GOLDEN / "full").decisions


@pytest.mark.parametrize("chunk", [(1, 2, 32, 24), (3, 2, 5, 24), (2, 1, 32, 7)])
def test_chunks_may_lie_in_any_way(chunk: tuple[int, ...], changed: Callable[..., Any]) -> None:
    name = "PaliGemma/llm/layers/mlp/gating_einsum"
    whole = load(GOLDEN / "full")
    folder = changed()({})
    step = folder / str(STEP)
    saved = SavedArrays(step)
    found = {n: saved.read(n).numpy() for n in saved.headers}
    shutil.rmtree(step / "params")
    write(step, found, chunks={name: chunk})
    for (key, ours), (_, theirs) in zip(
        load(folder).module.named_parameters(), whole.module.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), key


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the pieces that are read."""
    sizes: list[int] = []
    original = SavedArrays._box

    def counting(self: SavedArrays, name: str, box: Any) -> torch.Tensor:
        found = original(self, name, box)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(SavedArrays, "_box", counting)
    yield sizes


def test_no_more_than_the_window_is_kept_of_stacked_arrays(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with a window of all layers every array is read once."""
    policy = stream_policy(GOLDEN / "full" / str(STEP), choices_of(GOLDEN / "full"))
    assert policy.store is not None
    arrays = policy.store._places["action_in_proj.weight"].arrays  # type: ignore[attr-defined]
    names = [name for name, _ in policy.module.named_parameters() if ".layers." in name]
    for name in names:
        policy.store.read(name)
    stacked = {n: h for n, h in arrays.headers.items() if "/layers/" in n or "/encoderblock/" in n}
    assert len(counted) == len(stacked)
    counted.clear()
    arrays._windows.clear()
    monkeypatch.setattr(orbax_arrays, "WINDOW_BYTES", 80_000)
    for name in names:
        policy.store.read(name)
        assert sum(kept.nbytes for _, kept in arrays._windows.values()) <= 80_000
    assert len(counted) > len(stacked)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda s: shutil.rmtree(s / "params"), r"without the item params/.*it has .*assets"),
        (
            lambda s: (s / "params" / "_METADATA").unlink(),
            r"params has no _METADATA: .* not copied",
        ),
        (lambda s: (s / "params" / "manifest.ocdbt").unlink(), r"params has no manifest\.ocdbt"),
        (lambda s: (s / "params" / "_METADATA").write_text("{"), r"_METADATA is not valid JSON"),
        (
            lambda s: (s / "params" / "_METADATA").write_text("{}"),
            r"_METADATA has no tree_metadata",
        ),
        (lambda s: (s / "params" / "manifest.ocdbt").write_bytes(b"x"), r"cannot read manifest"),
        (lambda s: shutil.rmtree(s / "params" / "d"), r"cannot read .* missing or damaged; copy"),
        (lambda s: shutil.rmtree(s / "assets"), r"assets has no my_robot/norm_stats\.json"),
        (lambda s: uncommitted(s), r"not finished \(_CHECKPOINT_METADATA has no commit_timestamp"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:30],
)
def test_a_damaged_or_unfinished_step_is_named_with_what_to_do(
    damage: Callable[[Path], object], expected: str, folder: Callable[..., Path]
) -> None:
    copied = folder()
    damage(copied / str(STEP))
    refused(copied, expected)


def uncommitted(step: Path) -> None:
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit_timestamp_nsecs": None}))


def test_every_file_that_is_missing_is_noticed(folder: Callable[..., Path]) -> None:
    """Files of the database that no longer serve anybody may be gone."""
    files = sorted(p for p in (GOLDEN / "full" / str(STEP) / "params").rglob("*") if p.is_file())
    noticed = 0
    for path in files:
        copied = folder()
        (copied / path.relative_to(GOLDEN / "full")).unlink()
        try:
            load(copied)
        except PolicyError as error:
            assert str(copied / str(STEP) / "params") in str(error)
            noticed += 1
        shutil.rmtree(copied)
    assert noticed >= 3


def test_what_is_no_step_says_which_folder_to_give(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    copied = folder()
    options, step = choices_of(copied), copied / str(STEP)
    for given, expected in (
        (copied, rf"a folder of a training's steps; give one of them: {step}"),
        (step / "params", rf"an item of a checkpoint; give the step it is in: {step}"),
    ):
        with pytest.raises(PolicyError, match=expected):
            stream_policy(given, options)
    for name in ("30000.orbax-checkpoint-tmp", "30000.orbax-checkpoint-tmp-17"):
        unfinished = step.rename(tmp_path / name)
        with pytest.raises(PolicyError, match=r"a save that was not finished \(it has \.orbax"):
            stream_policy(unfinished, options)
        unfinished.rename(step)
    (step / "params").rename(step / "params.orbax-checkpoint-tmp")
    with pytest.raises(PolicyError, match=r"it holds params\.orbax-checkpoint-tmp\): give an earl"):
        stream_policy(step, options)


def test_a_link_out_of_the_step_is_refused(folder: Callable[..., Path]) -> None:
    copied = folder()
    manifest = copied / str(STEP) / "params" / "manifest.ocdbt"
    outside = manifest.rename(copied.parent / "outside")
    manifest.symlink_to(outside)
    refused(copied, r"manifest\.ocdbt is a link that leads out of the directory")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"PaliGemma/llm/layers/attn/q_einsum/w": None},
            r"does not fit the policy: missing PaliGemma/llm/layers/attn/q_einsum/w$",
        ),
        (
            {"PaliGemma/llm/extra/w": np.zeros(3, np.float32)},
            r"unexpected PaliGemma/llm/extra/w \[3\]",
        ),
        (
            {"PaliGemma/llm/layers/mlp/linear": np.zeros((4, 24, 32), np.float32)},
            r"linear is a stack of \[4\] layers, PaliGemma/llm/layers/.* of \[3\]",
        ),
        (
            {"PaliGemma/llm/final_norm_1/Dense_0/kernel": np.zeros((3, 16, 48), np.float32)},
            r"final_norm_1/Dense_0/kernel has shape \[3, 16, 48\], which is of no such",
        ),
        ({"time_mlp_in/bias": np.zeros(17, np.float32)}, r"time_mlp_in\.bias has shape \[17\]"),
        ({"time_mlp_in/bias": np.zeros(16, np.int32)}, r"time_mlp_in\.bias has dtype torch\.int32"),
        (
            {"time_mlp_in/kernel": None, "state_proj/kernel": np.zeros((8, 16), np.float32)},
            r"missing PaliGemma/llm/final_norm_1/scale; missing state_proj/bias; missing act",
        ),
        (
            {"PaliGemma/llm/layers/attn/q_einsum/w": np.full((3, 4, 32, 8), np.nan, np.float32)},
            r"PaliGemma/llm/layers/attn/q_einsum/w of .*params has NaN or Inf",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    changes: dict[str, Any], expected: str, changed: Callable[..., Any]
) -> None:
    refused(changed()(changes), expected)


@pytest.mark.parametrize("missing", range(0, 51, 7))
def test_no_array_is_replaced_by_anything(missing: int, changed: Callable[..., Any]) -> None:
    names = sorted(SavedArrays(GOLDEN / "full" / str(STEP)).headers)
    assert len(names) == 51
    refused(changed()({names[missing]: None}), f"missing {names[missing]}|no policy this version")


def test_another_trainers_checkpoint_is_not_taken_for_openpis(
    folder: Callable[..., Path],
) -> None:
    copied = folder()
    step = copied / str(STEP)
    shutil.rmtree(step / "params")
    write(step, {"decoder/layers/mlp/kernel": np.zeros((2, 3), np.float32)})
    refused(
        copied, r"JAX checkpoint of no policy this version reads; its arrays are decoder/layers"
    )


@pytest.mark.parametrize(
    ("training", "changes", "expected"),
    [
        (
            {"lora": {}},
            {},
            rf'has {Q_A}, a LoRA of rank 2, .*Add "lora": \{{"backbone": "gemma_2b_',
        ),
        (
            {"lora": {"backbone": "gemma_2b_lora", "expert": "gemma_300m_lora"}},
            {},
            rf"{Q_A} is a LoRA of rank 2, the training configuration says 16 for the backbone",
        ),
        ({}, {Q_A: None}, rf"has PaliGemma/.*/lora_b and no {Q_A}: half an adapter"),
        (
            {},
            {Q_A: np.zeros((3, 4, 32, 3), np.float32)},
            r"q_einsum/lora_b has shape \[3, 4, 2, 8\]; an adapter of rank 3 of .* \[3, 4, 3, 8\]",
        ),
        ({"lora": {"backbone": {"rank": 0}}}, {}, r"training\.json: [\s\S]*rank"),
        (
            {"robot_action_dim": 9},
            {},
            r"a robot of 9 numbers per action .* the weights \(action_out_proj\) give 8",
        ),
        ({"state_dim": 6}, {}, r"statistics of 5 dimensions of state, the robot has 6"),
    ],
)
def test_a_training_configuration_of_other_weights_is_refused(
    training: dict[str, Any], changes: dict[str, Any], expected: str, changed: Callable[..., Any]
) -> None:
    with pytest.raises(PolicyError, match=expected):
        load(changed("lora", **training)(changes))


def test_an_adapter_that_is_announced_has_to_be_there(changed: Callable[..., Any]) -> None:
    folder = changed("full", lora={"expert": {"rank": 4}})({})
    refused(folder, r"has a LoRA of the expert, and .* has no .*q_einsum_1/lora_a: it is another")


def test_the_training_configuration_is_asked_for_and_its_name_seen_in_the_path(
    tmp_path: Path,
) -> None:
    step = tmp_path / "checkpoints" / "pi05_libero" / "mine" / str(STEP)
    shutil.copytree(GOLDEN / "full" / str(STEP), step)
    with pytest.raises(PolicyError, match=r"A folder of its path is called pi05_libero$"):
        stream_policy(step)


def test_an_answer_that_a_jax_checkpoint_has_no_use_for_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"openpi's JAX trainer, which has no use for --tied"):
        stream_policy(GOLDEN / "full" / str(STEP), CheckpointOptions(tied="head"))


def test_without_tensorstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    expected = (
        r"reading a JAX checkpoint needs .*tensorstore.*\(the extra 'openpi'\)|extra 'openpi'"
    )
    with pytest.raises(MissingPackageError, match=expected):
        load(GOLDEN / "full")


# --- the full-size layout, from arrays without data ----------------------------------------------


def test_the_arrays_of_full_size_are_the_published_policy(
    tmp_path: Path, sentencepiece_model: bytes
) -> None:
    step = tmp_path / "full"
    write_step(step, full_shapes(), None)
    (step / "tokenizer.model").write_bytes(sentencepiece_model)
    statistics = step / "assets" / "droid" / "norm_stats.json"
    statistics.parent.mkdir(parents=True)
    entry = {name: [value] * 8 for name, value in (("q01", -1.0), ("q99", 1.0))}
    statistics.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    options = CheckpointOptions(training_config="pi05_droid")
    policy = stream_policy(step, options)
    expected = Pi05Config.full(horizon=15, cameras=2)
    changes = {"robot_action_dim": 8, "state_dim": 8, "image_fit": "antialiased", "robot": DROID}
    assert policy.config == expected.model_copy(update=changes)
    assert sum(parameter.numel() for parameter in policy.module.parameters()) == 3_244_377_872
    assert policy.dropped_parameters == 109_056_000  # both heads, which JAX does not have, apart
    assert policy.store is not None
    with pytest.raises(PolicyError, match=r"cannot read time_mlp_in/kernel of .*params: NOT_FOUND"):
        policy.store.read("time_mlp_in.weight")
