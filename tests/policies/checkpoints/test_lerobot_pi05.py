"""LeRobot's pi05 directories: nothing has to be chosen, everything is read or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import robot_observation
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.choices import Choices
from omega_qvla.policies.loading import load_policy, stream_policy
from omega_qvla.policies.normalization import MeanStd, Range, Unchanged

NORM = "policy_preprocessor_step_2_normalizer_processor.safetensors"
CAMERAS = ("front", "wrist")


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def step(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in content["steps"] if s["registry_name"] == name)


def test_a_directory_loads_with_no_choice_at_all(lerobot_directory: Callable[..., Path]) -> None:
    policy = load_policy(lerobot_directory())
    config = policy.config
    assert (config.horizon, config.steps, config.cameras) == (4, 5, CAMERAS)
    assert (config.state_dim, config.robot_action_dim, config.action_dim) == (3, 3, 8)
    assert (config.state_in_prompt, config.prompt_state_dim) == (True, 8)
    assert config.image_fit == "lerobot"
    chunk = policy.sample_actions(robot_observation(CAMERAS))
    assert chunk.shape == (4, 3) and np.isfinite(chunk).all()
    assert (chunk[:, 2] < 1e-6).all()  # the last action's quantiles are both 0


def test_the_state_in_the_prompt_is_padded_after_normalization(
    lerobot_directory: Callable[..., Path],
) -> None:
    """By hand: quantiles (-1, 1), (-2, 2), (0, 4) of the state (0.5, -1, 3), then five zeros."""
    processor = load_policy(lerobot_directory()).processor
    prompt = processor.prompt(robot_observation(CAMERAS))
    bins = "192 64 192 128 128 128 128 128"
    assert prompt == f"Task: pick up the black bowl, State: {bins};\nAction: "


def test_images_that_are_not_square_get_lerobots_bars(
    lerobot_directory: Callable[..., Path],
) -> None:
    pixels, _ = load_policy(lerobot_directory()).processor.encode(robot_observation(CAMERAS))
    assert pixels.shape == (1, 2, 3, 28, 28)
    assert (pixels[..., :4, :] == -3).all() and (pixels[..., 4:24, :] >= -1).all()


def test_weights_are_the_same_with_and_without_the_prefix_and_left_in_the_file(
    lerobot_directory: Callable[..., Path],
) -> None:
    prefixed = load_policy(lerobot_directory())
    bare = load_policy(lerobot_directory("bare", prefix=""))
    streamed = stream_policy(lerobot_directory("streamed"))
    assert streamed.store is not None
    for name, parameter in prefixed.module.named_parameters():
        assert torch.equal(bare.module.get_parameter(name), parameter)
        assert torch.equal(streamed.store.read(name), parameter)


def test_some_tensors_with_and_some_without_prefix_are_refused(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()
    tensors = load_file(directory / "model.safetensors")
    tensors["time_mlp_in.bias"] = tensors.pop("model.time_mlp_in.bias")
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        PolicyError, match=r"some .* prefix 'model\.' and time_mlp_in\.bias does not"
    ):
        load_policy(directory)


@pytest.mark.parametrize(
    ("modes", "state", "actions"),
    [
        ({}, Range, Range),
        ({"STATE": "MEAN_STD", "ACTION": "MIN_MAX"}, MeanStd, Range),
        ({"STATE": "IDENTITY", "ACTION": "MEAN_STD"}, Unchanged, MeanStd),
        ({"STATE": "QUANTILE10", "ACTION": "QUANTILE10"}, Range, Range),
    ],
)
def test_each_feature_is_normalized_as_its_mode_says(
    modes: dict[str, str], state: type, actions: type, lerobot_directory: Callable[..., Path]
) -> None:
    mapping = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"} | modes
    statistics = load_policy(lerobot_directory(normalization_mapping=mapping)).processor.statistics
    assert isinstance(statistics.state, state) and isinstance(statistics.actions, actions)
    if modes.get("STATE") == "QUANTILE10":
        assert statistics.state == Range(
            low=(-0.5, -1.0, 1.0), high=(0.5, 1.0, 3.0), flat_width=1e-8
        )


def test_cameras_keep_the_names_the_robot_gives_them(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()
    mapping = {"observation.images.top": "observation.images.front"}

    def rename(content: dict[str, Any]) -> None:
        step(content, "rename_observations_processor")["config"] = {"rename_map": mapping}

    change_json(directory / "policy_preprocessor.json", rename)
    assert load_policy(directory).config.cameras == ("top", "wrist")


def test_without_the_prompt_step_the_state_stays_out_of_the_prompt(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()

    def without(content: dict[str, Any]) -> None:
        name = "pi05_prepare_state_tokenizer_processor_step"
        content["steps"].remove(step(content, name))

    change_json(directory / "policy_preprocessor.json", without)
    policy = load_policy(directory)
    assert policy.processor.prompt(robot_observation(CAMERAS)) == "pick up the black bowl\n"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"type": "act"}, "LeRobot policy of type 'act'; this version reads pi05"),
        ({"type": "pi0"}, "of type 'pi0'"),
        ({"paligemma_variant": "gemma_2b"}, "paligemma_variant gemma_2b, the weights need dummy"),
        ({"max_action_dim": 32}, "max_action_dim 32, the weights need 8"),
        ({"image_resolution": [224, 224]}, r"image_resolution \(224, 224\), the weights need"),
        ({"min_period": 0.1}, "min_period 0.1, the weights need 0.004"),
        ({"chunk_size": 0}, r"(?s)is not a LeRobot configuration: .*chunk_size"),
        ({"use_peft": True}, "holds adapters to another checkpoint"),
        ({"input_features": {}}, "has no feature 'observation.state'"),
        ({"output_features": {}}, "has no feature 'action'"),
        (
            {"normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "QUANTILES"}},
            "normalizes images",
        ),
        ({"normalization_mapping": {"STATE": "SIGMOID"}}, "'SIGMOID' of STATE is not known"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    changes: dict[str, Any], expected: str, lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    change_json(directory / "config.json", lambda content: content.update(changes))
    if "normalization_mapping" in changes:
        mapping = changes["normalization_mapping"]
        change_json(
            directory / "policy_preprocessor.json",
            lambda c: step(c, "normalizer_processor")["config"].update(norm_map=mapping),
        )
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory)


def test_a_state_of_another_width_than_its_statistics_is_refused(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()
    change_json(
        directory / "config.json",
        lambda c: c["input_features"]["observation.state"].update(shape=[7]),
    )
    expected = r"statistics of observation\.state have 3 and 3 dimensions, the policy has 7"
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory)


@pytest.mark.parametrize("statistic", ["q01", "q99"])
@pytest.mark.parametrize("feature", ["observation.state", "action"])
def test_missing_statistics_are_refused_where_lerobot_goes_on_with_raw_units(
    statistic: str, feature: str, lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    for path in directory.glob("policy_p*_step_*.safetensors"):
        tensors = load_file(path)
        del tensors[f"{feature}.{statistic}"]
        save_file(tensors, path)
    with pytest.raises(PolicyError, match=rf"has no {statistic} of {feature}.*without the stat"):
        load_policy(directory)


def test_a_policy_saved_without_a_statistics_file_is_refused(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()
    change_json(
        directory / "policy_preprocessor.json",
        lambda c: step(c, "normalizer_processor").pop("state_file"),
    )
    with pytest.raises(PolicyError, match=r"has no q01 and no q99 of observation\.state"):
        load_policy(directory)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("policy_preprocessor.json", "migrate_policy_normalization"),
        ("policy_postprocessor.json", "migrate_policy_normalization"),
        (NORM, NORM),
        ("tokenizer.model", r"curl -o tokenizer\.model"),
        ("model.safetensors", r"neither model\.safetensors"),
    ],
)
def test_a_missing_file_is_named_with_the_remedy(
    file: str, expected: str, lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    (directory / file).unlink()
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"steps": 3}, "no list of 'steps'"),
        ({"steps": [3]}, "a step must be an object"),
        ({"steps": [{"config": {}}]}, "needs a name"),
        ({"steps": [{"registry_name": "libero_processor"}]}, "'libero_processor', which this"),
        ({"steps": [{"class": "my.Step", "config": {}}]}, r"the step 'my\.Step', which"),
        ({"steps": []}, "has no step 'normalizer_processor'"),
        (
            {"steps": [{"registry_name": "normalizer_processor", "state_file": "../x"}]},
            "leads out of the directory",
        ),
        (
            {"steps": [{"registry_name": "normalizer_processor", "state_file": 7}]},
            "the file of step normalizer_processor is 7",
        ),
        ({"steps": [{"registry_name": "tokenizer_processor"}] * 2}, "tokenizer_processor' twice"),
    ],
)
def test_a_pipeline_that_is_not_understood_is_refused(
    content: dict[str, Any], expected: str, lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    (directory / "policy_preprocessor.json").write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory)


def test_another_tokenizer_than_paligemmas_is_refused(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = lerobot_directory()
    change_json(
        directory / "policy_preprocessor.json",
        lambda c: step(c, "tokenizer_processor")["config"].update(tokenizer_name="bert"),
    )
    with pytest.raises(PolicyError, match="names the tokenizer bert"):
        load_policy(directory)


def test_a_tokenizer_in_the_hubs_cache_is_found(
    lerobot_directory: Callable[..., Path],
    sentencepiece_model: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    directory = lerobot_directory()
    (directory / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    snapshot = tmp_path / "cache" / "models--google--paligemma-3b-pt-224" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(sentencepiece_model)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load_policy(directory).processor.tokenizer.size > 0
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    given = Choices(tokenizer=tmp_path / "elsewhere.model")
    assert load_policy(directory, given).processor.tokenizer.size > 0


def test_a_quantized_lerobot_policy_needs_neither_checkpoint_nor_tokenizer_file(
    lerobot_directory: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    directory = lerobot_directory()
    policy = load_policy(directory)
    observation = robot_observation(CAMERAS)
    quantized = oq.quantize(policy, [observation], "rtn")
    quantized.save_pretrained(tmp_path / "artifact")
    noise = np.zeros((4, 8), np.float32)
    expected = quantized.sample_actions(observation, noise)
    shutil.rmtree(directory)
    assert np.array_equal(
        oq.load(tmp_path / "artifact").sample_actions(observation, noise), expected
    )
