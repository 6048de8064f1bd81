"""openpi's checkpoints as published: sizes from the tensors, the rest from its training code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import (
    TRAINING,
    official_shapes,
    openpi_statistics,
    robot_observation,
    tiny_official,
    write_headers,
)
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.layers import siglip_checkpoints
from omega_qvla.policies.paligemma import sizes
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi_training import DROID
from omega_qvla.policies.paligemma.sizes import EMBEDDING, TIED_HEAD
from omega_qvla.policies.pi05.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.policy import Pi05Policy

GATE = "paligemma_with_expert.paligemma.model.language_model.layers.3.mlp.gate_proj.weight"


def choices(directory: Path, **changes: Any) -> CheckpointOptions:
    path = directory.parent / "chosen.json"
    path.write_text(json.dumps(TRAINING | changes))
    return CheckpointOptions(training_config=str(path))


def test_a_converted_checkpoint_loads_with_what_its_training_code_says(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory()
    policy = load_policy(directory, choices(directory))
    expected = tiny_official().model_copy(update={"image_fit": "antialiased"})
    assert policy.config == expected
    assert torch.equal(
        policy.module.embed_tokens.weight,
        load_file(directory / "model.safetensors")[TIED_HEAD].float(),
    )
    dead = dropped_shapes(policy.config)
    del dead[TIED_HEAD]  # the embedding, which is not dead
    assert policy.dropped_parameters == sum(int(np.prod(shape)) for shape in dead.values())
    chunk = policy.sample_actions(robot_observation(policy.config.cameras))
    assert chunk.shape == (4, 3) and np.isfinite(chunk).all()


def test_weights_left_in_the_file_are_the_weights_that_are_read(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory()
    read, streamed = (f(directory, choices(directory)) for f in (load_policy, stream_policy))
    assert streamed.store is not None
    for name, parameter in read.module.named_parameters():
        assert torch.equal(streamed.store.read(name), parameter)
    assert streamed.dropped_parameters == read.dropped_parameters


def test_the_prompt_is_tokenized_as_openpi_does(
    openpi_directory: Callable[..., Path], sentencepiece_model: bytes
) -> None:
    """Both forms by hand: the state's bins, and the line break encoded on its own."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    directory = openpi_directory()
    with_state = load_policy(directory, choices(directory)).processor
    observation = robot_observation(with_state.config.cameras)
    # normalized state: 0.5, -0.5, 0.5 → bins of width 2/256
    text = "Task: pick up the black bowl, State: 191 63 191;\nAction: "
    assert with_state.encode(observation)[1].tolist()[0] == reference.encode(text, add_bos=True)
    plain = load_policy(directory, choices(directory, state_in_prompt=False)).processor
    expected = reference.encode("pick up the black bowl", add_bos=True) + reference.encode("\n")
    assert plain.encode(observation)[1].tolist()[0] == expected


def test_the_artifact_rebuilds_the_tokenizer_without_the_checkpoint(
    openpi_directory: Callable[..., Path], sentencepiece_model: bytes
) -> None:
    directory = openpi_directory()
    policy = load_policy(directory, choices(directory))
    config, files = policy.describe()
    assert files["tokenizer.model"] == sentencepiece_model
    again = Pi05Policy.skeleton(json.loads(json.dumps(config)), files).processor
    observation = robot_observation(policy.config.cameras)
    for ours, theirs in zip(
        again.encode(observation), policy.processor.encode(observation), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(PolicyError, match=r"refers to tokenizer\.model, which is missing"):
        Pi05Policy.skeleton(config, {k: v for k, v in files.items() if k != "tokenizer.model"})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, r"openpi keeps that in its code.*pi05_libero, pi05_droid.*--training-config"),
        ("pi05_moon", "unknown training configuration 'pi05_moon' of pi0.5; known: pi05_libero"),
        ("pi05_base", "the weights others start from"),
        ("nowhere.json", r"cannot read the training configuration nowhere\.json"),
        ("pi05_libero", "has action_horizon 4, the training configuration pi05_libero .* say 10"),
    ],
)
def test_what_the_checkpoint_does_not_say_is_asked_for(
    choice: str | None, expected: str, openpi_directory: Callable[..., Path]
) -> None:
    with pytest.raises(PolicyError, match=expected):
        load_policy(openpi_directory(), CheckpointOptions(training_config=choice))


@pytest.mark.parametrize(
    "changes", [{"horizon": 0}, {"cameras": []}, {"surprise": 1}, {"state_in_prompt": "perhaps"}]
)
def test_an_invalid_training_configuration_is_refused(
    changes: dict[str, Any], openpi_directory: Callable[..., Path]
) -> None:
    directory = openpi_directory()
    with pytest.raises(PolicyError, match=f"{next(iter(changes))}"):
        load_policy(directory, choices(directory, **changes))


def test_known_training_configurations_say_what_openpi_says() -> None:
    """``training/config.py`` and ``policies/*_policy.py`` at 15a9616."""
    known = PUBLISHED.known
    libero, droid = known["pi05_libero"], known["pi05_droid"]
    assert (libero.horizon, libero.state_in_prompt, libero.robot_action_dim) == (10, False, 7)
    assert (droid.horizon, droid.state_in_prompt, droid.robot_action_dim) == (15, True, 8)
    assert known["pi05_droid_finetune"].horizon == 16
    assert not set(known) & set(PUBLISHED.unsupported)


def test_statistics_are_those_of_the_named_robot(openpi_directory: Callable[..., Path]) -> None:
    directory = openpi_directory()
    other = directory / "assets" / "trossen"
    other.mkdir()
    (other / "norm_stats.json").write_text(json.dumps(openpi_statistics()))
    with pytest.raises(PolicyError, match=r"found 2: physical-intelligence/libero, trossen"):
        load_policy(directory, choices(directory))
    chosen = choices(directory, asset_id="physical-intelligence/libero")
    assert load_policy(directory, chosen).config.horizon == 4


def test_the_statistics_of_another_robot_than_the_named_one_are_refused(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory()
    expected = r"no my_robot/norm_stats\.json.*has those of: physical-intelligence/libero"
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, choices(directory, asset_id="my_robot"))


@pytest.mark.parametrize(
    ("remove", "expected"),
    [
        ("assets/physical-intelligence/libero/norm_stats.json", r"norm_stats\.json, found 0"),
        ("model.safetensors", r"has neither model\.safetensors nor"),
        ("tokenizer.model", r"curl -o tokenizer\.model .*paligemma_tokenizer\.model"),
    ],
)
def test_a_missing_file_is_named_with_the_way_to_get_it(
    remove: str, expected: str, openpi_directory: Callable[..., Path]
) -> None:
    directory = openpi_directory()
    (directory / remove).unlink()
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, choices(directory))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_damaged_tokenizer_is_refused(
    content: bytes, openpi_directory: Callable[..., Path]
) -> None:
    directory = openpi_directory()
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(PolicyError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_policy(directory, choices(directory))


def test_without_statistics_of_quantiles_a_checkpoint_is_refused(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory()
    content = openpi_statistics()
    content["norm_stats"]["actions"] = {"mean": [0.0] * 3, "std": [1.0] * 3}
    path = directory / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match="q01"):
        load_policy(directory, choices(directory))


def test_pi0_is_not_taken_for_its_successor(openpi_directory: Callable[..., Path]) -> None:
    directory = openpi_directory()
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if ".dense." not in name}
    tensors |= {"state_proj.weight": torch.zeros(64, 8)}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(PolicyError, match="pi0 reads the state as a token of its own"):
        load_policy(directory, choices(directory))


def test_heads_that_shapes_do_not_tell_are_not_guessed(
    openpi_directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = openpi_directory()
    monkeypatch.delitem(siglip_checkpoints.VISION_HEADS, (64, 72))
    with pytest.raises(PolicyError, match="no number of heads is known"):
        load_policy(directory, choices(directory))
    monkeypatch.setitem(siglip_checkpoints.VISION_HEADS, (64, 72), 2)
    monkeypatch.delitem(sizes.GEMMA_VARIANTS, "dummy")
    with pytest.raises(PolicyError, match="none of gemma_2b, gemma_300m"):
        load_policy(directory, choices(directory))


# --- the full-size layout, from headers alone (the data are a hole in the file) -------------------


@pytest.fixture
def full_directory(tmp_path: Path, sentencepiece_model: bytes) -> Callable[..., Path]:
    def write(shapes: dict[str, tuple[int, ...]]) -> Path:
        directory = tmp_path / "full"
        statistics = directory / "assets" / "droid"
        statistics.mkdir(parents=True)
        entry = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
        text = json.dumps({"norm_stats": {"state": entry, "actions": entry}})
        (statistics / "norm_stats.json").write_text(text)
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
        write_headers(directory / "model.safetensors", shapes)
        return directory

    return write


def test_the_published_layout_is_accepted_to_the_last_key(
    full_directory: Callable[..., Path],
) -> None:
    """812 tensors: openpi's 813 names, of which embedding and head are one."""
    shapes = official_shapes(Pi05Config.full())
    assert len(shapes) == 812
    policy = stream_policy(full_directory(shapes), CheckpointOptions(training_config="pi05_droid"))
    full = Pi05Config.full(horizon=15, cameras=2)
    changes = {"robot_action_dim": 8, "state_dim": 8, "image_fit": "antialiased"}
    changes["robot"] = DROID
    assert policy.config == full.model_copy(update=changes)
    kept = sum(parameter.numel() for parameter in policy.module.parameters())
    assert kept + policy.dropped_parameters == 3_616_757_520
    assert policy.store is not None and policy.store.read("action_in_proj.bias").shape == (1024,)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({GATE: None}, rf"missing {GATE} \[16384, 2048\]"),
        ({GATE: (16384, 2047)}, rf"{GATE} has shape \[16384, 2047\], expected \[16384, 2048\]"),
        ({"extra.weight": (3,)}, r"unexpected extra\.weight \[3\]"),
        ({TIED_HEAD: None}, f"missing {EMBEDDING}"),
        ({"time_mlp_in.weight": (1024, 1025)}, r"time_mlp_in\.weight has shape"),
        (
            {"paligemma_with_expert.gemma_expert.lm_head.weight": (257152, 1023)},
            r"gemma_expert\.lm_head\.weight has shape \[257152, 1023\]",
        ),
    ],
)
def test_one_key_of_the_full_layout_missing_extra_or_misshaped_is_named(
    change: dict[str, Any], expected: str, full_directory: Callable[..., Path]
) -> None:
    shapes = official_shapes(Pi05Config.full()) | change
    directory = full_directory({name: shape for name, shape in shapes.items() if shape is not None})
    with pytest.raises(PolicyError, match=expected):
        stream_policy(directory, CheckpointOptions(training_config="pi05_droid"))


def test_every_missing_key_of_a_small_checkpoint_is_named(
    openpi_directory: Callable[..., Path],
) -> None:
    """Whichever tensor is taken away: none is replaced by anything."""
    directory = openpi_directory()
    path, chosen = directory / "model.safetensors", choices(directory)
    tensors, dead = load_file(path), dropped_shapes(tiny_official())
    needed = [name for name in tensors if name not in dead or name == TIED_HEAD]
    for name in needed[:: max(1, len(needed) // 25)]:
        save_file({key: t for key, t in tensors.items() if key != name}, path)
        wanted = EMBEDDING if name == TIED_HEAD else name
        with pytest.raises(PolicyError, match=f"{wanted}|vision tower|is none of|no pi0.5"):
            oq.load_policy(directory, chosen)
