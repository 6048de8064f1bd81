"""Checkpoints in official formats at small sizes, made of the project's own modules.

Everything but the sizes is as published: names of tensors, dead weights, the head that stands for
the embedding it is tied to, mixed float32 and bfloat16, and all files beside the weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omega_qvla.policies.checkpoints.pi05_sizes import EMBEDDING, GEMMA_VARIANTS, TIED_HEAD
from omega_qvla.policies.pi05 import Pi05Config, Pi05Module, VisionConfig, dropped_shapes

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


def official_shapes(config: Pi05Config) -> dict[str, tuple[int, ...]]:
    """What openpi's ``save_model`` writes: dead weights too, the head in place of the embedding."""
    with torch.device("meta"):
        module = Pi05Module(config)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    shapes |= dropped_shapes(config)
    del shapes[EMBEDDING]
    return shapes


def official_tensors(config: Pi05Config, seed: int = 0) -> dict[str, torch.Tensor]:
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
    """``config.json`` of LeRobot 0.4.4's pi05 with three cameras, the last a placeholder."""
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
        "license": None,
        "paligemma_variant": "dummy",
        "action_expert_variant": "dummy",
        "dtype": "bfloat16",
        "chunk_size": 4,
        "n_action_steps": 4,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "num_inference_steps": 5,
        "min_period": 0.004,
        "max_period": 4.0,
        "image_resolution": [28, 28],
        "empty_cameras": 1,
        "tokenizer_max_length": 200,
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": "QUANTILES",
            "ACTION": "QUANTILES",
        },
    }


def lerobot_pipelines(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two pipelines as LeRobot 0.4.4 saves them for pi05."""
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
            "registry_name": "normalizer_processor",
            "config": norm,
            "state_file": state.format("pre", 2, ""),
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
