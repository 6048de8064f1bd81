"""LeRobot's pi05 directories: nothing has to be chosen, everything is read or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import older_lerobot_config, robot_observation
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.processing.normalization import MeanStd, Range, Unchanged
from omega_qvla.serving.server.policy_engine import PolicyEngine

NORM = "policy_preprocessor_step_3_normalizer_processor.safetensors"
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
    assert (config.state_in_prompt, config.prompt_state_dim) == (True, None)
    assert config.image_fit == "lerobot-0.5"
    chunk = policy.sample_actions(robot_observation(CAMERAS))
    assert chunk.shape == (4, 3) and np.isfinite(chunk).all()
    assert (chunk[:, 2] < 1e-6).all()  # the last action's quantiles are both 0


def written_by(directory: Path, *without: str) -> Path:
    """The directory with the ``config.json`` of an older release: less the fields later ones have;
    up to 0.5.0 its pipelines have no steps for relative actions either."""
    change_json(directory / "config.json", lambda c: older_lerobot_config(c, *without))

    def without_relative(content: dict[str, Any]) -> None:
        relative = ("relative_actions_processor", "absolute_actions_processor")
        content["steps"] = [s for s in content["steps"] if s["registry_name"] not in relative]

    if "0.5.1" in without:
        for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
            change_json(directory / name, without_relative)
    return directory


V040, V043, V051 = ("0.6.0", "0.5.1", "0.4.3"), ("0.6.0", "0.5.1"), ("0.6.0",)
OWN, PADDED = "192 64 192", "192 64 192 128 128 128 128 128"
"""By hand: quantiles (-1, 1), (-2, 2), (0, 4) of the state (0.5, -1, 3), then five zeros."""


@pytest.mark.parametrize(
    ("without", "said", "bins", "bar", "evidence"),
    [
        ((), None, OWN, -1, "0.6.0 or later"),
        (V051, None, OWN, -1, "0.5.1 or later"),
        (V043, "lerobot-0.5", OWN, -1, "lerobot-0.5, as you said"),
        (V043, "lerobot-0.4", PADDED, -3, "lerobot-0.4, as you said"),
        (V040, None, PADDED, -3, "0.4.0 to 0.4.2"),
    ],
)
def test_the_network_is_shown_what_the_release_that_wrote_the_checkpoint_shows_it(
    without: tuple[str, ...],
    said: Any,
    bins: str,
    bar: int,
    evidence: str,
    lerobot_directory: Callable[..., Path],
) -> None:
    policy = load_policy(
        written_by(lerobot_directory(), *without), CheckpointOptions(written_by=said)
    )
    observation = robot_observation(CAMERAS)
    prompt = policy.processor.prompt(observation)
    assert prompt == f"Task: pick up the black bowl, State: {bins};\nAction: "
    pixels, _ = policy.processor.encode(observation)
    assert pixels.shape == (1, 2, 3, 28, 28)
    assert (pixels[..., :4, :] == bar).all() and (pixels[..., 4:24, :] >= -1).all()
    assert evidence in policy.decisions["written by"]
    assert f"{bar}" in policy.decisions["images"]


def test_a_checkpoint_that_does_not_tell_its_release_is_refused_until_the_user_does(
    lerobot_directory: Callable[..., Path],
) -> None:
    directory = written_by(lerobot_directory(), *V043)
    with pytest.raises(PolicyError, match=r"0\.4\.3, 0\.4\.4 or 0\.5\.0.*--written-by"):
        load_policy(directory)


@pytest.mark.parametrize(
    ("without", "said"), [((), "lerobot-0.4"), (V051, "lerobot-0.4"), (V040, "lerobot-0.5")]
)
def test_a_release_that_contradicts_the_files_is_refused(
    without: tuple[str, ...], said: Any, lerobot_directory: Callable[..., Path]
) -> None:
    directory = written_by(lerobot_directory(), *without)
    with pytest.raises(PolicyError, match=rf"not by {said}: leave --written-by out"):
        load_policy(directory, CheckpointOptions(written_by=said))


def test_a_fine_tune_that_kept_the_pipelines_of_an_older_base_is_read_by_its_own_release(
    lerobot_directory: Callable[..., Path],
) -> None:
    newer = json.loads((lerobot_directory("newer") / "config.json").read_text())
    directory = written_by(lerobot_directory(), *V043)
    (directory / "config.json").write_text(json.dumps(newer))
    policy = load_policy(directory)
    assert "0.6.0 or later" in policy.decisions["written by"]
    assert policy.config.prompt_state_dim is None


@pytest.mark.parametrize("name", ["use_visual_memory", "include_state_in_prompt"])
@pytest.mark.parametrize("value", [True, False])
def test_a_setting_that_is_not_known_is_refused_by_name_unless_the_user_knows_it(
    name: str, value: bool, lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    change_json(directory / "config.json", lambda content: content.update({name: value}))
    with pytest.raises(PolicyError, match=rf"{name} = {value}.*--ignore-settings {name}"):
        load_policy(directory)
    policy = load_policy(directory, CheckpointOptions(ignore_settings=(name,)))
    assert policy.decisions["ignored settings"] == name
    with pytest.raises(PolicyError, match="names chunk_size, which is not an unknown setting"):
        load_policy(directory, CheckpointOptions(ignore_settings=(name, "chunk_size")))


@pytest.mark.parametrize(
    ("pipeline", "name", "changes"),
    [
        ("pre", "tokenizer_processor", {"padding_side": "left"}),
        ("pre", "tokenizer_processor", {"task_key": "instruction"}),
        ("pre", "tokenizer_processor", {"truncation": False}),
        ("pre", "tokenizer_processor", {"lower_case": True}),
        ("pre", "normalizer_processor", {"clip": 5.0}),
        ("pre", "pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": 32}),
        ("pre", "rename_observations_processor", {"strict": True}),
        ("pre", "device_processor", {"float_dtype": "bfloat16"}),
        ("pre", "to_batch_processor", {"size": 2}),
        ("post", "unnormalizer_processor", {"clip": 5.0}),
        ("post", "device_processor", {"float_dtype": "float16"}),
        ("post", "absolute_actions_processor", {"exclude": []}),
    ],
)
def test_a_step_with_a_changed_or_unknown_setting_is_refused(
    pipeline: str, name: str, changes: dict[str, Any], lerobot_directory: Callable[..., Path]
) -> None:
    directory = lerobot_directory()
    change_json(
        directory / f"policy_{pipeline}processor.json",
        lambda content: step(content, name)["config"].update(changes),
    )
    with pytest.raises(PolicyError, match=rf"(?s){name}.*{next(iter(changes))}"):
        load_policy(directory)


def test_steps_in_another_order_are_refused(lerobot_directory: Callable[..., Path]) -> None:
    directory = lerobot_directory()

    def swap(content: dict[str, Any]) -> None:
        steps = content["steps"]
        steps[3], steps[4] = steps[4], steps[3]  # the prompt before the state is normalized

    change_json(directory / "policy_preprocessor.json", swap)
    with pytest.raises(PolicyError, match="steps in another order"):
        load_policy(directory)


def test_answers_to_what_a_checkpoint_does_not_ask_are_refused(
    lerobot_directory: Callable[..., Path],
) -> None:
    given = CheckpointOptions(training_config="pi05_libero", data_config="libero")
    expected = r"LeRobot's pi05, which has no use for --training-config, --data-config"
    with pytest.raises(PolicyError, match=expected):
        load_policy(lerobot_directory(), given)


def test_what_was_decided_goes_into_the_artifact_and_to_its_robots(
    lerobot_directory: Callable[..., Path], tmp_path: Path
) -> None:
    policy = load_policy(lerobot_directory())
    quantized = oq.quantize(policy, [robot_observation(CAMERAS)], "rtn")
    quantized.save_pretrained(tmp_path / "artifact")
    loaded = oq.load(tmp_path / "artifact")
    assert loaded.policy.decisions == policy.decisions
    assert policy.decisions["cameras"] == "front, wrist; empty_camera_0 left out"
    served = PolicyEngine(loaded.policy).specification().dump()["decisions"]
    assert served == policy.decisions
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert f"- written by: {policy.decisions['written by']}" in card


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
        ({"type": "act"}, "LeRobot policy of type 'act'"),
        ({"type": "pi0"}, "is not a pi0 checkpoint: it has no state_proj.weight"),
        ({"paligemma_variant": "gemma_2b"}, "paligemma_variant gemma_2b, the weights need dummy"),
        ({"max_action_dim": 32}, "max_action_dim 32, the weights need 8"),
        ({"image_resolution": [224, 224]}, r"image_resolution \(224, 224\), the weights need"),
        ({"min_period": 0.1}, "min_period 0.1, the weights need 0.004"),
        ({"chunk_size": 0}, r"(?s)is not a LeRobot configuration: .*chunk_size"),
        ({"n_obs_steps": 2}, r"(?s)is not a LeRobot configuration: .*n_obs_steps"),
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


def test_statistics_under_another_name_are_listed(lerobot_directory: Callable[..., Path]) -> None:
    directory = lerobot_directory()
    for path in directory.glob("policy_p*_step_*.safetensors"):
        tensors = load_file(path)
        save_file({k.replace("observation.state", "state"): t for k, t in tensors.items()}, path)
    expected = r"no q01 and no q99 of observation\.state.*it has statistics of .*\bstate \(.*q01"
    with pytest.raises(PolicyError, match=expected):
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
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    directory = lerobot_directory()
    (directory / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    snapshot = tmp_path / "cache" / "models--google--paligemma-3b-pt-224" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.model").write_bytes(sentencepiece_model)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load_policy(directory).processor.tokenizer.size > 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    given = CheckpointOptions(tokenizer=tmp_path / "elsewhere.model")
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
