"""GR00T N1.5 directories: of Isaac-GR00T, and of LeRobot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_formats import (
    GR00T_EMBEDDING,
    GR00T_HEAD,
    QWEN_IMAGE_TOKEN,
    gr00t_metadata,
    gr00t_settings,
    gr00t_shapes,
    gr00t_tensors,
    robot_observation,
    small_qwen,
    tiny_gr00t,
    write_headers,
)
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy, stream_policy
from omega_qvla.policies.gr00t_n15.checkpoints import sizes
from omega_qvla.policies.gr00t_n15.checkpoints.data_config import DATA_CONFIGS, UNSUPPORTED
from omega_qvla.policies.gr00t_n15.checkpoints.metadata import METADATA
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import dropped_shapes, stacked_keys
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.processing.normalization import Range

LIBERO = CheckpointOptions(data_config="libero")
GATE = "backbone.eagle_model.language_model.model.layers.11.mlp.gate_proj.weight"


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def libero_observation() -> dict[str, Any]:
    observation = robot_observation(("image", "wrist_image"))
    return observation | {"state": np.array([1.0, -2.0, 0.0, 0.5, 0.0, 0.0, 1.0], np.float32)}


def test_a_directory_loads_with_the_chosen_data_configuration(
    gr00t_directory: Callable[..., Path],
) -> None:
    policy = load_policy(gr00t_directory(), LIBERO)
    assert isinstance(policy, Gr00tN15Policy)
    whole = tiny_gr00t(262, QWEN_IMAGE_TOKEN)
    assert policy.config == whole.keeping((31,), 31)
    tensors = gr00t_tensors(whole)
    for name, parameter in policy.module.named_parameters():
        stored = tensors[GR00T_HEAD if name == GR00T_EMBEDDING else name].float()
        assert torch.equal(parameter, stored[31:32] if name in stacked_keys() else stored)
    chunk = policy.sample_actions(libero_observation())
    assert chunk.shape == (16, 7) and np.isfinite(chunk).all()


def test_other_embodiments_and_dead_weights_are_counted_as_dropped(
    gr00t_directory: Callable[..., Path],
) -> None:
    policy = load_policy(gr00t_directory(), LIBERO)
    total = sum(t.numel() for t in gr00t_tensors(tiny_gr00t(262, QWEN_IMAGE_TOKEN)).values())
    kept = sum(parameter.numel() for parameter in policy.module.parameters())
    assert kept + policy.dropped_parameters == total


def test_weights_left_in_the_shards_are_the_weights_that_are_read(
    gr00t_directory: Callable[..., Path],
) -> None:
    directory = gr00t_directory()
    read, streamed = load_policy(directory, LIBERO), stream_policy(directory, LIBERO)
    assert read.store is None and streamed.store is not None
    for name, parameter in read.module.named_parameters():
        assert torch.equal(streamed.store.read(name), parameter)
    assert streamed.dropped_parameters == read.dropped_parameters


def test_state_and_prompt_by_hand(gr00t_directory: Callable[..., Path]) -> None:
    """Parts of range [-2, 2] are halved, the gripper goes from [0, 1] to [-1, 1], zeros follow."""
    policy = load_policy(gr00t_directory(), LIBERO)
    inputs = policy.processor.encode(libero_observation())
    expected = [0.5, -1.0, 0.0, 0.25, 0.0, 0.0, 1.0] + [0.0] * 9
    assert inputs.state.tolist() == [expected]
    tokenizer, tokens = policy.processor.tokenizer, inputs.token_ids[0].tolist()
    images = "<image {}><img>" + "<IMG_CONTEXT>" * policy.config.tokens_per_image + "</img>"
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{images.format(1)}{images.format(2)}['pick up the black_bowl']<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens == tokenizer.encode(text)


def test_actions_come_back_in_the_robots_units(gr00t_directory: Callable[..., Path]) -> None:
    directory = gr00t_directory()
    chunk = torch.full((16, 8), 0.5)
    min_max = load_policy(directory, LIBERO).processor.decode(chunk)
    assert np.allclose(min_max[0], [1.0] * 6 + [0.75])
    mean_std = load_policy(directory, CheckpointOptions(data_config="libero_mean_std")).processor
    assert np.allclose(mean_std.decode(chunk)[0], [0.5 + 0.5 * 0.25] * 6 + [0.75])


def test_the_artifact_needs_neither_checkpoint_nor_tokenizer_files(
    gr00t_directory: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    directory = gr00t_directory()
    policy = load_policy(directory, LIBERO)
    quantized = oq.quantize(policy, [libero_observation()], "rtn")
    quantized.save_pretrained(tmp_path / "artifact")
    noise = np.zeros((16, 8), np.float32)
    expected = quantized.sample_actions(libero_observation(), noise)
    shutil.rmtree(directory)
    loaded = oq.load(tmp_path / "artifact")
    assert np.array_equal(loaded.sample_actions(libero_observation(), noise), expected)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (CheckpointOptions(), r"Name one \(fourier_gr1_arms_only.*--data-config"),
        (
            CheckpointOptions(data_config="moon"),
            "unknown data configuration 'moon'; known:",
        ),
        (CheckpointOptions(data_config="oxe_droid"), "converts rotations"),
        (
            CheckpointOptions(data_config="nowhere.json"),
            r"cannot read the data configuration nowhere\.json",
        ),
        (
            CheckpointOptions(data_config="so100"),
            r"has no camera webcam; it knows image, wrist_image",
        ),
        (
            CheckpointOptions(embodiment="gr1", data_config="libero"),
            "has no embodiment 'gr1'; it knows new_embodiment",
        ),
    ],
)
def test_what_the_checkpoint_does_not_say_is_asked_for(
    choices: CheckpointOptions, expected: str, gr00t_directory: Callable[..., Path]
) -> None:
    with pytest.raises(PolicyError, match=expected):
        load_policy(gr00t_directory(), choices)


def test_of_several_embodiments_one_has_to_be_chosen(
    gr00t_directory: Callable[..., Path],
) -> None:
    directory = gr00t_directory(tags=("gr1", "new_embodiment", "robocasa"))
    with pytest.raises(PolicyError, match=r"3 embodiments: gr1, new_embodiment, robocasa"):
        load_policy(directory, LIBERO)
    chosen = load_policy(directory, CheckpointOptions(embodiment="gr1", data_config="libero"))
    assert chosen.config.embodiments == (24,)
    with pytest.raises(PolicyError, match=r"'robocasa' has no layers of its own; known: gr1"):
        load_policy(directory, CheckpointOptions(embodiment="robocasa", data_config="libero"))


def test_a_data_configuration_of_ones_own_is_read_from_a_file(
    gr00t_directory: Callable[..., Path], tmp_path: Path
) -> None:
    own = {"cameras": ["image"], "state": {"x": "sine_cosine"}, "actions": {"gripper": "binary"}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own | {"horizon": 8, "instruction": "plain"}))
    policy = load_policy(gr00t_directory(), CheckpointOptions(data_config=str(path)))
    observation = robot_observation(("image",)) | {"state": np.array([np.pi / 2], np.float32)}
    state = policy.processor.encode(observation).state[0, :3]
    assert torch.allclose(state, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    chunk = policy.sample_actions(observation)
    assert chunk.shape == (8, 1) and set(chunk.ravel().tolist()) <= {0.0, 1.0}
    path.write_text(json.dumps(own | {"state": {"x": "sigmoid"}}))
    with pytest.raises(PolicyError, match=r"cannot read the data configuration .*own\.json"):
        load_policy(gr00t_directory("again"), CheckpointOptions(data_config=str(path)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m["statistics"]["state"].pop("x"), "no statistics or shape of state x; it kno"),
        (lambda m: m["modalities"]["action"].pop("yaw"), "no statistics or shape of action yaw"),
        (lambda m: m["statistics"]["action"]["x"].pop("min"), "metadata of new_embodiment are inv"),
        (lambda m: m.pop("statistics"), "metadata of new_embodiment are invalid"),
        (
            lambda m: m["statistics"]["state"]["x"].update(min=[0.0, 0.0]),
            r"state\.x has 1 dimensions and statistics of \[1, 2\]",
        ),
        (
            lambda m: m["modalities"]["action"]["x"].update(continuous=False),
            r"action\.x is not continuous and cannot be normalized by min_max",
        ),
        (lambda m: m["modalities"]["state"]["x"].update(shape=[1, 1]), "not one dimension"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], Any], expected: str, gr00t_directory: Callable[..., Path]
) -> None:
    directory = gr00t_directory()

    def edit(content: dict[str, Any]) -> None:
        # the fixture shares one object between parts: take them apart first
        content["new_embodiment"] = json.loads(json.dumps(content["new_embodiment"]))
        change(content["new_embodiment"])

    change_json(directory / METADATA, edit)
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, LIBERO)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (METADATA, r"has no experiment_cfg/metadata\.json, so the statistics"),
        ("merges.txt", r"hf download lerobot/eagle2hg-processor-groot-n1p5 vocab\.json merges"),
        ("model-00002-of-00002.safetensors", r"names model-00002-of-00002\.safetensors, which is"),
        ("config.json", "is not a pi0.5 checkpoint|no config.json"),
    ],
)
def test_a_missing_file_is_named_with_the_remedy(
    file: str, expected: str, gr00t_directory: Callable[..., Path]
) -> None:
    directory = gr00t_directory()
    (directory / file).unlink()
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, LIBERO)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "gr00t_n1"}, "is of GR00T N1, which is another network"),
        ({"action_dim": 32}, "action_dim 32, the weights have 8"),
        ({"backbone_cfg": {"select_layer": 12}}, "select_layer 12, the weights have 2"),
        ({"backbone_cfg": {}}, "not a GR00T N1.5 configuration"),
        ({"action_head_cfg": 3}, "not a GR00T N1.5 configuration"),
    ],
)
def test_a_configuration_of_another_network_is_refused(
    change: dict[str, Any], expected: str, gr00t_directory: Callable[..., Path]
) -> None:
    directory = gr00t_directory()
    change_json(directory / "config.json", lambda content: content.update(change))
    with pytest.raises(PolicyError, match=expected):
        load_policy(directory, LIBERO)


def test_heads_that_the_widths_contradict_are_refused(
    gr00t_directory: Callable[..., Path],
) -> None:
    directory = gr00t_directory()
    change_json(
        directory / "config.json",
        lambda c: c["action_head_cfg"]["diffusion_model_cfg"].update(num_attention_heads=3),
    )
    with pytest.raises(PolicyError, match=r"diffusion_model_cfg width 24, the weights have 32"):
        load_policy(directory, LIBERO)


def test_the_known_data_configurations_are_isaac_gr00ts() -> None:
    """Widths of LIBERO's state and actions, and who is refused."""
    assert list(DATA_CONFIGS["libero"].state) == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    goal = DATA_CONFIGS["libero_mean_std"].actions
    assert goal["x"] == "mean_std" and goal["gripper"] == "min_max"
    assert all(config.horizon == 16 for config in DATA_CONFIGS.values())
    assert not set(DATA_CONFIGS) & set(UNSUPPORTED)


# --- the full-size layout, from headers alone (the data are a hole in the file) -------------------


@pytest.fixture
def full_directory(tmp_path: Path) -> Callable[[dict[str, tuple[int, ...]]], Path]:
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")

    def write(shapes: dict[str, tuple[int, ...]]) -> Path:
        directory = tmp_path / "full"
        (directory / "experiment_cfg").mkdir(parents=True)
        (directory / METADATA).write_text(json.dumps(gr00t_metadata()))
        (directory / "config.json").write_text(json.dumps(gr00t_settings(Gr00tN15Config.full())))
        for file, content in small_qwen().items():
            (directory / file).write_bytes(content)
        write_headers(directory / "model.safetensors", shapes)
        return directory

    return write


def test_the_published_layout_is_accepted_to_the_last_key(
    full_directory: Callable[..., Path],
) -> None:
    policy = stream_policy(full_directory(gr00t_shapes(Gr00tN15Config.full())), LIBERO)
    full = Gr00tN15Config.full(
        cameras=("image", "wrist_image"), embodiments=(31,), state_dim=7, robot_action_dim=7
    )
    prompt = full.prompt.model_copy(update={"instruction": "listed"})
    assert policy.config == full.model_copy(
        update={"image_token": QWEN_IMAGE_TOKEN, "prompt": prompt}
    )
    kept = sum(parameter.numel() for parameter in policy.module.parameters())
    # the published 2.4 billion, the tied head counted once
    assert round((kept + policy.dropped_parameters) / 1e6, 1) == 2413.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({GATE: None}, rf"missing {GATE} \[6144, 2048\]"),
        ({GATE: (6144, 2047)}, rf"{GATE} has shape \[6144, 2047\], expected \[6144, 2048\]"),
        ({"extra.weight": (3,)}, r"unexpected extra\.weight \[3\]"),
        ({GR00T_HEAD: None}, f"missing {GR00T_EMBEDDING}"),
        (
            {"action_head.action_decoder.layer2.W": (31, 1024, 32)},
            r"action_decoder\.layer2\.W has shape \[31, 1024, 32\], expected \[32, 1024, 32\]",
        ),
        ({"action_head.future_tokens.weight": None}, "is not a GR00T N1.5 checkpoint"),
    ],
)
def test_one_key_of_the_full_layout_missing_extra_or_misshaped_is_named(
    change: dict[str, Any], expected: str, full_directory: Callable[..., Path]
) -> None:
    shapes = gr00t_shapes(Gr00tN15Config.full()) | change
    directory = full_directory({name: shape for name, shape in shapes.items() if shape is not None})
    with pytest.raises(PolicyError, match=expected):
        stream_policy(directory, LIBERO)


def test_the_pooling_head_is_known_to_be_dead() -> None:
    dead = dropped_shapes(Gr00tN15Config.full())
    pooling = sum(int(np.prod(s)) for name, s in dead.items() if ".head." in name)
    assert round(pooling / 1e6, 1) == 15.2


# --- LeRobot --------------------------------------------------------------------------------------


def test_lerobots_directory_loads_with_no_choice_at_all(
    groot_directory: Callable[..., Path],
) -> None:
    policy = load_policy(groot_directory())
    config = policy.config
    assert config.cameras == ("front", "wrist")  # sorted by name, as LeRobot stacks them
    assert (config.horizon, config.steps, config.embodiments) == (16, 4, (31,))
    assert (config.image_filter, config.image_crop) == ("bicubic", 1.0)
    statistics = policy.processor.statistics
    assert statistics.state == Range(low=(-3.0, -3.0, -1.0), high=(3.0, 5.0, 9.0))
    observation = robot_observation(("front", "wrist"))
    state = policy.processor.encode(observation).state[0]
    assert torch.allclose(state[:4], torch.tensor([1 / 6, -0.5, -0.2, 0.0]), atol=1e-6)
    assert policy.sample_actions(observation).shape == (16, 3)


def test_another_embodiment_of_lerobots_may_be_chosen(
    groot_directory: Callable[..., Path],
) -> None:
    directory = groot_directory()
    assert load_policy(directory, CheckpointOptions(embodiment="so100")).config.embodiments == (2,)
    with pytest.raises(PolicyError, match=r"'moon' has no layers.*new_embodiment, oxe_droid"):
        load_policy(directory, CheckpointOptions(embodiment="moon"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_state_dim": 64}, "max_state_dim 64, the weights have 16"),
        ({"max_action_dim": 32}, "max_action_dim 32, the weights have 8"),
        ({"output_features": {}}, "has no feature 'action'"),
        (
            {"input_features": {"observation.state": {"type": "STATE", "shape": [3]}}},
            "has no image",
        ),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [5]}}},
            "statistics of action have 3 and 3 dimensions, the policy has 5",
        ),
    ],
)
def test_a_lerobot_configuration_that_does_not_fit_is_refused(
    changes: dict[str, Any], expected: str, groot_directory: Callable[..., Path]
) -> None:
    with pytest.raises(PolicyError, match=expected):
        load_policy(groot_directory(**changes))


@pytest.mark.parametrize("feature", ["observation.state", "action"])
def test_missing_statistics_are_refused_where_lerobot_goes_on_with_raw_units(
    feature: str, groot_directory: Callable[..., Path]
) -> None:
    directory = groot_directory()
    for path in directory.glob("policy_p*_step_*.safetensors"):
        tensors = load_file(path)
        del tensors[f"{feature}.min"]
        save_file(tensors, path)
    with pytest.raises(PolicyError, match=f"has no minima and maxima of {feature}"):
        load_policy(directory)


def test_heads_of_a_size_that_was_not_published_are_not_guessed(
    groot_directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = groot_directory()
    monkeypatch.delitem(sizes.HEAD_HEADS, 32)
    with pytest.raises(PolicyError, match=r"widths 64 .* and 32 .*heads are not known"):
        load_policy(directory)


def test_the_full_size_layout_under_lerobots_prefix_is_accepted(
    groot_directory: Callable[..., Path],
) -> None:
    directory = groot_directory(max_state_dim=64, max_action_dim=32)
    shapes = gr00t_shapes(Gr00tN15Config.full())
    prefixed = {f"_groot_model.{name}": shape for name, shape in shapes.items()}
    write_headers(directory / "model.safetensors", prefixed, "F32")
    assert stream_policy(directory).config.head.heads == 32
    del prefixed[f"_groot_model.{GATE}"]
    write_headers(directory / "model.safetensors", prefixed, "F32")
    with pytest.raises(PolicyError, match=f"missing {GATE}"):
        stream_policy(directory)
