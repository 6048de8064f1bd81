"""openpi's pi0 as its converter saves it."""

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
    tiny_pi0,
    write_headers,
)
from safetensors.torch import load_file, save_file

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi_training import DROID
from omega_qvla.policies.paligemma.sizes import EMBEDDING, TIED_HEAD
from omega_qvla.policies.pi0.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.policy import Pi0Policy

PI0_TRAINING = {key: value for key, value in TRAINING.items() if key != "state_in_prompt"}
MEAN, STD = [0.5, -1.0, 2.0], [0.5, 2.0, 0.0]


@pytest.fixture
def pi0_directory(openpi_directory: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a pi0 checkpoint as openpi's converter does, one dimension without spread."""

    def write() -> Path:
        directory = openpi_directory("pi0", tiny_pi0())
        statistics = openpi_statistics()
        for entry in statistics["norm_stats"].values():
            entry |= {"mean": MEAN, "std": STD}
        path = directory / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
        path.write_text(json.dumps(statistics))
        return directory

    return write


def choices(directory: Path, **changes: Any) -> CheckpointOptions:
    path = directory.parent / "chosen.json"
    path.write_text(json.dumps(PI0_TRAINING | changes))
    return CheckpointOptions(training_config=str(path))


def test_a_converted_checkpoint_loads_with_what_its_training_code_says(
    pi0_directory: Callable[..., Path],
) -> None:
    directory = pi0_directory()
    policy = load_policy(directory, choices(directory))
    assert isinstance(policy, Pi0Policy)
    assert policy.config == tiny_pi0().model_copy(update={"image_fit": "antialiased"})
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(policy.module.embed_tokens.weight, stored[TIED_HEAD].float())
    assert torch.equal(policy.module.state_proj.weight, stored["state_proj.weight"].float())
    dead = dropped_shapes(policy.config)
    del dead[TIED_HEAD]  # the embedding, which is not dead
    assert policy.dropped_parameters == sum(int(np.prod(shape)) for shape in dead.values())
    chunk = policy.sample_actions(robot_observation(policy.config.cameras))
    assert chunk.shape == (4, 3) and np.isfinite(chunk).all()
    assert policy.decisions["state in the prompt"] == "a token of its own, not in the prompt"


def test_state_and_actions_are_normalized_by_mean_and_deviation(
    pi0_directory: Callable[..., Path],
) -> None:
    """openpi's formula by hand: (x - mean)/(std + 1e-6), zeros behind; and back."""
    directory = pi0_directory()
    processor = load_policy(directory, choices(directory)).processor
    observation = robot_observation(processor.config.cameras) | {"state": np.array([1, 1, 2.5])}
    state = processor.encode(observation).state
    expected = [0.5 / 0.500001, 2.0 / 2.000001, 0.5 / 1e-6, 0, 0, 0, 0, 0]
    torch.testing.assert_close(state, torch.tensor([expected], dtype=torch.float32))
    actions = processor.decode(torch.ones(4, 8))
    np.testing.assert_allclose(actions, [[1.000001, 1.000001, 2.000001]] * 4, rtol=1e-6)


def test_the_prompt_is_the_instruction_and_a_line_break_of_its_own(
    pi0_directory: Callable[..., Path], sentencepiece_model: bytes
) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    directory = pi0_directory()
    processor = load_policy(directory, choices(directory)).processor
    observation = robot_observation(processor.config.cameras) | {"prompt": " pick_up the\nbowl "}
    expected = reference.encode("pick up the bowl", add_bos=True) + reference.encode("\n")
    assert processor.encode(observation).token_ids.tolist() == [expected]


def test_the_artifact_s_description_rebuilds_the_processor(
    pi0_directory: Callable[..., Path],
) -> None:
    directory = pi0_directory()
    policy = load_policy(directory, choices(directory))
    config, files = policy.describe()
    again = Pi0Policy.skeleton(json.loads(json.dumps(config)), files).processor
    observation = robot_observation(policy.config.cameras)
    encoded = policy.processor.encode(observation)
    for ours, theirs in zip(again.encode(observation), encoded, strict=True):
        assert torch.equal(ours, theirs)
    assert again.statistics == policy.processor.statistics


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state_in_prompt": True}, "pi0 reads the state as a token of its own"),
        ({"state_dim": 9}, r"has a state of 9 numbers, the weights \(state_proj.weight\) read 8"),
        ({"horizon": 5}, "has action_horizon 4"),
        ({"cameras": []}, "cameras"),
    ],
)
def test_another_configuration_than_that_of_the_weights_is_refused(
    changes: dict[str, Any], expected: str, pi0_directory: Callable[..., Path]
) -> None:
    directory = pi0_directory()
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, choices(directory, **changes))


def test_a_configuration_of_pi05_is_asked_of_pi0_in_vain(
    pi0_directory: Callable[..., Path],
) -> None:
    expected = r"unknown training configuration 'pi05_libero' of pi0; known: .*pi0_libero"
    with pytest.raises(PolicyError, match=expected):
        load_policy(pi0_directory(), CheckpointOptions(training_config="pi05_libero"))


def test_pi05_has_to_say_whether_its_state_is_in_the_prompt(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory("pi05", tiny_official())
    with pytest.raises(PolicyError, match="has to say state_in_prompt"):
        load_policy(directory, choices(directory))


def test_without_means_a_checkpoint_is_refused(pi0_directory: Callable[..., Path]) -> None:
    directory = pi0_directory()
    content = openpi_statistics()
    content["norm_stats"]["actions"] = {"q01": [0.0] * 3, "q99": [1.0] * 3}
    path = directory / "assets" / "physical-intelligence" / "libero" / "norm_stats.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match="mean/std"):
        load_policy(directory, choices(directory))


def test_known_training_configurations_say_what_openpi_says() -> None:
    """``training/config.py`` and ``policies/*_policy.py`` at 15a9616."""
    known = PUBLISHED.known
    libero, droid = known["pi0_libero"], known["pi0_droid"]
    assert (libero.horizon, libero.relative_actions) == (50, (True,) * 6 + (False,))
    assert (droid.horizon, droid.relative_actions, droid.prompt_length) == (10, (), None)
    polaris = known["pi0_droid_jointpos_polaris"]
    assert (polaris.prompt_length, polaris.relative_actions) == (100, (True,) * 7 + (False,))


# --- the full-size layout, from headers alone (the data are a hole in the file) -------------------


@pytest.fixture
def full_directory(tmp_path: Path, sentencepiece_model: bytes) -> Callable[..., Path]:
    def write(shapes: dict[str, tuple[int, ...]]) -> Path:
        directory = tmp_path / "full"
        (directory / "assets" / "droid").mkdir(parents=True)
        entry = {"mean": [0.0] * 8, "std": [1.0] * 8}
        text = json.dumps({"norm_stats": {"state": entry, "actions": entry}})
        (directory / "assets" / "droid" / "norm_stats.json").write_text(text)
        (directory / "tokenizer.model").write_bytes(sentencepiece_model)
        write_headers(directory / "model.safetensors", shapes)
        return directory

    return write


def test_the_published_layout_is_accepted_to_the_last_key(
    full_directory: Callable[..., Path],
) -> None:
    """777 tensors: openpi's 778 names, of which embedding and head are one."""
    shapes = official_shapes(Pi0Config.full())
    assert len(shapes) == 777
    policy = stream_policy(full_directory(shapes), CheckpointOptions(training_config="pi0_droid"))
    full = Pi0Config.full(horizon=10, cameras=2)
    changes = {"robot_action_dim": 8, "state_dim": 8, "image_fit": "antialiased"}
    changes["robot"] = DROID
    assert policy.config == full.model_copy(update=changes)
    kept = sum(parameter.numel() for parameter in policy.module.parameters())
    assert kept + policy.dropped_parameters == 3_501_372_176


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"action_time_mlp_in.weight": None}, r"missing action_time_mlp_in\.weight \[1024, 2048\]"),
        ({"action_time_mlp_in.weight": (1024, 1024)}, r"action_time_mlp_in\.weight has shape"),
        ({"time_mlp_in.weight": (1024, 1024)}, r"unexpected time_mlp_in\.weight \[1024, 1024\]"),
        ({TIED_HEAD: None}, f"missing {EMBEDDING}"),
        (
            {"paligemma_with_expert.gemma_expert.model.norm.weight": None},
            r"missing paligemma_with_expert\.gemma_expert\.model\.norm\.weight \[1024\]",
        ),
    ],
)
def test_one_key_of_the_full_layout_missing_extra_or_misshaped_is_named(
    change: dict[str, Any], expected: str, full_directory: Callable[..., Path]
) -> None:
    shapes = official_shapes(Pi0Config.full()) | change
    directory = full_directory({name: shape for name, shape in shapes.items() if shape is not None})
    with pytest.raises(PolicyError, match=expected):
        stream_policy(directory, CheckpointOptions(training_config="pi0_droid"))


def test_a_damaged_file_is_refused_as_damaged(pi0_directory: Callable[..., Path]) -> None:
    directory = pi0_directory()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PolicyError, match="damaged or half-downloaded"):
        load_policy(directory, choices(directory))


def test_two_layouts_never_claim_one_directory(
    pi0_directory: Callable[..., Path], openpi_directory: Callable[..., Path]
) -> None:
    from omega_qvla.policies.families import families

    for directory in (pi0_directory(), openpi_directory("pi05")):
        content = json.loads((directory / "config.json").read_text())
        for shown in (content, None):
            claims = [
                family.name
                for family in families().values()
                for layout in family.layouts
                if layout.recognizes(directory, shown)
            ]
            assert claims == [directory.name]


def test_tensors_that_are_neither_are_refused(openpi_directory: Callable[..., Path]) -> None:
    directory = openpi_directory("neither", tiny_official())
    path = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if ".dense." not in k}, path)
    with pytest.raises(PolicyError, match=r"is not a pi0\.5 checkpoint: it has no .*dense\.weight"):
        load_policy(directory, choices(directory, state_in_prompt=True))
