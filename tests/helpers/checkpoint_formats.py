"""Checkpoints in official formats at small sizes, made of the project's own modules.

Everything but the sizes is as published: names of tensors, dead weights, the head that stands for
the embedding it is tied to, mixed float32 and bfloat16, and all files beside the weights.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT, Gr00tN15Config, TransformerConfig
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module
from omega_qvla.policies.gr00t_n15.network import dropped_shapes as gr00t_dropped_shapes
from omega_qvla.policies.layers.qwen3 import QwenConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.network import PaligemmaModule, dropped_shapes
from omega_qvla.policies.paligemma.sizes import EMBEDDING, GEMMA_VARIANTS, TIED_HEAD
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.network import Pi0Module
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module

VOCABULARY = 600
TRAINING = {
    "horizon": 4,
    "state_in_prompt": True,
    "state_dim": 3,
    "robot_action_dim": 3,
    "cameras": ["base_0_rgb", "left_wrist_0_rgb"],
}
SENTENCES = (
    "Task: pick up the black bowl, State: 128 127 3 255 0 64;",
    "put the red mug on the left plate and the white mug on the right plate",
    "open the top drawer of the cabinet and put the cream cheese into it",
    "Action: turn on the stove, State: 12 250 17 98 5 77;",
)


def tiny_official(horizon: int = 4) -> Pi05Config:
    """openpi's ``dummy`` Gemmas under a small vision tower."""
    dummy = GEMMA_VARIANTS["dummy"]
    return Pi05Config(
        vision=VisionConfig(width=64, hidden=72, heads=2, depth=1, image_size=28),
        backbone=dummy,
        expert=dummy,
        depth=2,
        vocabulary=VOCABULARY,
        horizon=horizon,
        action_dim=8,
        robot_action_dim=3,
        state_dim=3,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        prompt_length=200,
        state_in_prompt=True,
    )


def tiny_pi0() -> Pi0Config:
    """The same of pi0."""
    sizes = tiny_official().model_dump(exclude={"family", "state_in_prompt", "prompt_state_dim"})
    return Pi0Config(**{**sizes, "prompt_length": 48}, padded_state_dim=8)


def module_of(config: PaligemmaConfig) -> PaligemmaModule:
    """The network of a configuration, on the meta device."""
    with torch.device("meta"):
        return Pi0Module(config) if isinstance(config, Pi0Config) else Pi05Module(config)


def official_shapes(config: PaligemmaConfig) -> dict[str, tuple[int, ...]]:
    """What openpi's ``save_model`` writes: dead weights too, the head in place of the embedding."""
    module = module_of(config)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    shapes |= dropped_shapes(config)
    del shapes[EMBEDDING]
    return shapes


def official_tensors(config: PaligemmaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under official names, bfloat16 with the norms in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(official_shapes(config).items()):
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        drawn = torch.empty(shape).normal_(0.0, spread, generator=generator).bfloat16()
        tensors[name] = drawn.float() if "norm" in name else drawn
    assert TIED_HEAD in tensors
    return tensors


def write_headers(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file with a true header and a hole for data: full size costs no disk."""
    width, offset, header = {"BF16": 2, "F32": 4}[dtype], 0, {}
    for name, shape in shapes.items():
        end = offset + width * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def openpi_statistics(width: int = 3) -> dict[str, Any]:
    """``norm_stats.json`` with all the statistics openpi writes."""
    entry = {"mean": [0.0] * width, "std": [1.0] * width, "q01": [-1.0, -2.0, 0.0][:width]}
    entry["q99"] = [1.0, 2.0, 4.0][:width]
    return {"norm_stats": {"state": entry, "actions": entry}}


def lerobot_config() -> dict[str, Any]:
    """``config.json`` of LeRobot 0.6.1's pi05 with three cameras, the last a placeholder."""
    image = {"type": "VISUAL", "shape": [3, 480, 640]}
    return {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": {
            "observation.images.front": image,
            "observation.images.wrist": image,
            "observation.images.empty_camera_0": image,
            "observation.state": {"type": "STATE", "shape": [3]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
        "device": "cuda",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": True,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "pretrained_revision": None,
        "paligemma_variant": "dummy",
        "action_expert_variant": "dummy",
        "dtype": "bfloat16",
        "chunk_size": 4,
        "n_action_steps": 4,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "num_inference_steps": 5,
        "time_sampling_beta_alpha": 1.5,
        "time_sampling_beta_beta": 1.0,
        "time_sampling_scale": 0.999,
        "time_sampling_offset": 0.001,
        "min_period": 0.004,
        "max_period": 4.0,
        "use_relative_actions": False,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": None,
        "rtc_config": None,
        "image_resolution": [28, 28],
        "empty_cameras": 1,
        "tokenizer_max_length": 200,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": "QUANTILES",
            "ACTION": "QUANTILES",
        },
        "gradient_checkpointing": False,
        "compile_model": False,
        "compile_mode": "max-autotune",
        "freeze_vision_encoder": False,
        "train_expert_only": False,
        "optimizer_lr": 2.5e-05,
        "optimizer_betas": [0.9, 0.95],
        "optimizer_eps": 1e-08,
        "optimizer_weight_decay": 0.01,
        "optimizer_grad_clip_norm": 1.0,
        "scheduler_warmup_steps": 1000,
        "scheduler_decay_steps": 30000,
        "scheduler_decay_lr": 2.5e-06,
    }


LEROBOT_FIELDS_SINCE = {
    "0.4.3": ("use_peft", "freeze_vision_encoder", "train_expert_only"),
    "0.5.1": ("use_relative_actions", "relative_exclude_joints", "action_feature_names"),
    "0.6.0": ("pretrained_revision",),
}
"""Fields of pi05's ``config.json`` by the release that brought them."""


def older_lerobot_config(content: dict[str, Any], *releases: str) -> None:
    """Take the fields that these releases brought out of a ``config.json``."""
    for release in releases:
        for name in LEROBOT_FIELDS_SINCE[release]:
            del content[name]


def lerobot_pipelines(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two pipelines as LeRobot 0.6.1 saves them for pi05."""
    norm = {
        "eps": 1e-8,
        "features": {**config["input_features"], **config["output_features"]},
        "norm_map": config["normalization_mapping"],
    }
    tokenize = {
        "max_length": config["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    state = "policy_{}processor_step_{}_{}normalizer_processor.safetensors"
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {
            "registry_name": "relative_actions_processor",
            "config": {"enabled": False, "exclude_joints": ["gripper"], "action_names": None},
        },
        {
            "registry_name": "normalizer_processor",
            "config": norm,
            "state_file": state.format("pre", 3, ""),
        },
        {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
        {"registry_name": "tokenizer_processor", "config": tokenize},
        {
            "registry_name": "device_processor",
            "config": {"device": "cuda", "float_dtype": None},
        },
    ]
    after = [
        {
            "registry_name": "unnormalizer_processor",
            "config": {**norm, "features": dict(config["output_features"])},
            "state_file": state.format("post", 0, "un"),
        },
        {"registry_name": "absolute_actions_processor", "config": {"enabled": False}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    return (
        {"name": "policy_preprocessor", "steps": before},
        {"name": "policy_postprocessor", "steps": after},
    )


def lerobot_statistics() -> dict[str, torch.Tensor]:
    """A data set's statistics, flat as LeRobot writes them; the last action never moves."""
    values = {
        "min": [-3.0, -3.0, -1.0],
        "max": [3.0, 5.0, 9.0],
        "mean": [0.0, 1.0, 2.0],
        "std": [1.0, 2.0, 3.0],
        "count": [100.0],
        "q01": [-1.0, -2.0, 0.0],
        "q10": [-0.5, -1.0, 1.0],
        "q50": [0.0, 0.0, 2.0],
        "q90": [0.5, 1.0, 3.0],
        "q99": [1.0, 2.0, 4.0],
    }
    found = {f"observation.state.{k}": torch.tensor(v) for k, v in values.items()}
    found |= {f"action.{k}": torch.tensor(v) for k, v in values.items()}
    found["action.q99"] = torch.tensor([1.0, 2.0, 0.0])
    found["observation.images.front.mean"] = torch.zeros(3, 1, 1)
    return found


def robot_observation(cameras: tuple[str, ...], size: tuple[int, int] = (40, 56)) -> dict[str, Any]:
    """Noise images that are not square, a state, a sentence."""
    source = np.random.default_rng(0)
    return {
        "images": {name: source.integers(0, 256, (*size, 3), dtype=np.uint8) for name in cameras},
        "state": np.array([0.5, -1.0, 3.0], np.float32),
        "prompt": "pick up the black_bowl",
    }


# --- GR00T N1.5 -----------------------------------------------------------------------------

GR00T_EMBEDDING = "backbone.eagle_model.language_model.model.embed_tokens.weight"
GR00T_HEAD = "backbone.eagle_model.language_model.lm_head.weight"


def tiny_gr00t(vocabulary: int, image_token: int) -> Gr00tN15Config:
    """All 32 embodiments of a small network; the diffusion transformer's heads do not show."""
    return Gr00tN15Config(
        vision=VisionConfig(width=64, hidden=72, heads=2, depth=1, image_size=28),
        backbone=QwenConfig(width=64, hidden=128, heads=4, kv_heads=2, head_dim=16, depth=2),
        features=TransformerConfig(width=64, heads=2, depth=1),
        head=TransformerConfig(width=32, heads=4, depth=2),
        head_hidden=24,
        future_tokens=3,
        positions=32,
        vocabulary=vocabulary,
        image_token=image_token,
        horizon=16,
        action_dim=8,
        robot_action_dim=7,
        state_width=16,
        state_dim=7,
        embodiments=tuple(range(32)),
        embodiment=31,
        cameras=("image", "wrist_image"),
        image_crop=0.95,
        prompt=CHAT_PROMPT.model_copy(update={"instruction": "listed"}),
        prompt_length=512,
        steps=4,
    )


def gr00t_shapes(config: Gr00tN15Config) -> dict[str, tuple[int, ...]]:
    """Official names, dead weights included, embedding and tied head as one tensor."""
    with torch.device("meta"):
        module = Gr00tN15Module(config)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    shapes |= gr00t_dropped_shapes(config)
    del shapes[GR00T_EMBEDDING]
    return shapes


def gr00t_tensors(config: Gr00tN15Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights under official names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator).bfloat16()
        for name, shape in sorted(gr00t_shapes(config).items())
    }


def gr00t_settings(config: Gr00tN15Config) -> dict[str, Any]:
    """``config.json`` as Isaac-GR00T writes it at N1.5."""
    attention = {"dropout": 0.2, "final_dropout": True, "positional_embeddings": None}
    features, head = config.features, config.head
    return {
        "action_dim": config.action_dim,
        "action_head_cfg": {
            "action_dim": config.action_dim,
            "action_horizon": 16,
            "add_pos_embed": True,
            "backbone_embedding_dim": config.backbone.width,
            "diffusion_model_cfg": {
                **attention,
                "attention_head_dim": head.width // head.heads,
                "cross_attention_dim": config.backbone.width,
                "interleave_self_attention": True,
                "norm_type": "ada_norm",
                "num_attention_heads": head.heads,
                "num_layers": head.depth,
                "output_dim": config.head_hidden,
            },
            "hidden_size": config.head_hidden,
            "input_embedding_dim": head.width,
            "max_action_dim": config.action_dim,
            "max_state_dim": config.state_width,
            "num_inference_timesteps": 4,
            "num_target_vision_tokens": config.future_tokens,
            "num_timestep_buckets": 1000,
            "use_vlln": True,
            "vl_self_attention_cfg": {
                **attention,
                "attention_head_dim": features.width // features.heads,
                "num_attention_heads": features.heads,
                "num_layers": features.depth,
            },
        },
        "action_horizon": 16,
        "architectures": ["GR00T_N1_5"],
        "backbone_cfg": {
            "eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M",
            "load_bf16": False,
            "project_to_dim": None,
            "reproject_vision": False,
            "select_layer": config.backbone.depth,
            "tune_llm": False,
            "tune_visual": True,
            "use_flash_attention": True,
        },
        "compute_dtype": "bfloat16",
        "hidden_size": config.backbone.width,
        "model_dtype": "float32",
        "model_type": "gr00t_n1_5",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
    }


def gr00t_metadata(tags: tuple[str, ...] = ("new_embodiment",)) -> dict[str, Any]:
    """``metadata.json``: LIBERO's seven parts of one number; the gripper's range is 0 to 1."""
    parts = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    one = {"min": [-2.0], "max": [2.0], "mean": [0.5], "std": [0.25], "q01": [-1.0], "q99": [1.0]}
    statistics = {part: one for part in parts} | {"gripper": one | {"min": [0.0], "max": [1.0]}}
    shape = {"absolute": True, "rotation_type": None, "shape": [1], "continuous": True}
    video = {"resolution": [256, 256], "channels": 3, "fps": 20.0}
    return {
        tag: {
            "statistics": {"state": statistics, "action": statistics},
            "modalities": {
                "video": {"image": video, "wrist_image": video},
                "state": dict.fromkeys(parts, shape),
                "action": dict.fromkeys(parts, shape),
            },
            "embodiment_tag": tag,
        }
        for tag in tags
    }


def small_qwen() -> dict[str, bytes]:
    """Qwen's files with every byte, one merge and the special tokens of the prompt."""
    alphabet = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(256 - len(alphabet))]
    vocab = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
    special = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
    added = {text: len(vocab) + i for i, text in enumerate(special)}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\na b\n",
        "added_tokens.json": json.dumps(added).encode(),
    }


QWEN_TOKENS, QWEN_IMAGE_TOKEN = 262, 261
"""Of ``small_qwen``."""


def groot_config() -> dict[str, Any]:
    """``config.json`` of LeRobot 0.4.4's groot."""
    image = {"type": "VISUAL", "shape": [3, 256, 256]}
    return {
        "type": "groot",
        "n_obs_steps": 1,
        "input_features": {
            "observation.images.wrist": image,
            "observation.images.front": image,
            "observation.state": {"type": "STATE", "shape": [3]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
        "device": "cuda",
        "chunk_size": 50,
        "n_action_steps": 50,
        "max_state_dim": 16,
        "max_action_dim": 8,
        "image_size": [224, 224],
        "base_model_path": "nvidia/GR00T-N1.5-3B",
        "tokenizer_assets_repo": "lerobot/eagle2hg-processor-groot-n1p5",
        "embodiment_tag": "new_embodiment",
        "lora_rank": 0,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": "MEAN_STD",
            "ACTION": "MEAN_STD",
        },
    }


def groot_pipelines() -> tuple[dict[str, Any], dict[str, Any]]:
    """The two pipelines as LeRobot 0.4.4 saves them for groot."""
    pack = {
        "state_horizon": 1,
        "action_horizon": 16,
        "max_state_dim": 16,
        "max_action_dim": 8,
        "language_key": "task",
        "formalize_language": False,
        "embodiment_tag": "new_embodiment",
        "embodiment_mapping": {
            "new_embodiment": 31,
            "oxe_droid": 17,
            "agibot_genie1": 26,
            "gr1": 24,
            "so100": 2,
            "unitree_g1": 3,
        },
        "normalize_min_max": True,
    }
    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {
            "registry_name": "groot_pack_inputs_v3",
            "config": pack,
            "state_file": "policy_preprocessor_step_2_groot_pack_inputs_v3.safetensors",
        },
        {"registry_name": "groot_eagle_encode_v3", "config": {}},
        {"registry_name": "groot_eagle_collate_v3", "config": {}},
        {"registry_name": "device_processor", "config": {"device": "cuda"}},
    ]
    name = "groot_action_unpack_unnormalize_v1"
    after = [
        {
            "registry_name": name,
            "config": {"env_action_dim": 3, "normalize_min_max": True},
            "state_file": f"policy_postprocessor_step_0_{name}.safetensors",
        },
        {"registry_name": "device_processor", "config": {"device": "cpu"}},
    ]
    return (
        {"name": "policy_preprocessor", "steps": before},
        {"name": "policy_postprocessor", "steps": after},
    )


def train_sentencepiece() -> bytes:
    """A real sentencepiece model with PaliGemma's special tokens and single digits."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_lerobot_pi05(
    directory: Path, tokenizer: bytes, prefix: str = "model.", **changes: Any
) -> Path:
    """A pi05 checkpoint as LeRobot 0.6.1 writes it."""
    config = lerobot_config() | changes
    tensors = {prefix + k: v for k, v in official_tensors(tiny_official()).items()}
    _write_lerobot(directory, config, tensors, lerobot_pipelines(config))
    (directory / "tokenizer.model").write_bytes(tokenizer)
    return directory


def write_groot(directory: Path, **changes: Any) -> Path:
    """A groot checkpoint as LeRobot 0.4.4 writes it."""
    drawn = gr00t_tensors(tiny_gr00t(QWEN_TOKENS, QWEN_IMAGE_TOKEN))
    tensors = {f"_groot_model.{key}": tensor for key, tensor in drawn.items()}
    _write_lerobot(directory, groot_config() | changes, tensors, groot_pipelines())
    for file, content in small_qwen().items():
        (directory / file).write_bytes(content)
    return directory


def _write_lerobot(
    directory: Path,
    config: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    pipelines: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    for kind, pipeline in zip(("pre", "post"), pipelines, strict=True):
        (directory / f"policy_{kind}processor.json").write_text(json.dumps(pipeline))
        for step in pipeline["steps"]:
            if "state_file" in step:
                save_file(lerobot_statistics(), directory / step["state_file"])
