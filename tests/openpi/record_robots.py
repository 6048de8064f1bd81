"""Records what openpi's own transforms make of what robots send and of what networks give.

Runs in an environment with openpi's libraries and without this project, with openpi's two source
folders and ``tests/helpers`` on its path, and the safetensors file to write as ``{"out": ...}`` on
its standard input.  The transforms are those that ``create_trained_policy`` puts together from each
training configuration, but for the resizing of images and the tokens.  What is changed in openpi:
statistics are given instead of fetched, and there is no tokenizer.
"""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import openpi.models.tokenizer as tokenizer
import openpi.training.config as training
import openpi.transforms as transforms
from openpi_robots import CONFIGURATIONS, PADDED, chunk, messages, statistics
from safetensors.numpy import save_file


def stand_in(length: int) -> Any:
    """In place of PaliGemma's tokenizer, which is fetched when it is made."""
    return types.SimpleNamespace(length=length)


tokenizer.PaligemmaTokenizer = stand_in
training.DataConfigFactory._load_norm_stats = lambda *_: None
SKIPPED = (transforms.ResizeImages, transforms.TokenizePrompt)


def described(config: Any, data: Any) -> dict[str, Any]:
    """What a configuration says."""
    delta = [t for t in data.data_transforms.outputs if isinstance(t, transforms.AbsoluteActions)]
    aloha = [t for t in data.data_transforms.inputs if hasattr(t, "adapt_to_pi")]
    tokens = next(
        t for t in data.model_transforms.inputs if isinstance(t, transforms.TokenizePrompt)
    )
    return {
        "pi05": config.model.pi05,
        "horizon": config.model.action_horizon,
        "action_dim": config.model.action_dim,
        "prompt_length": tokens.tokenizer.length,
        "state_in_prompt": tokens.discrete_state_input,
        "asset_id": data.asset_id,
        "quantiles": data.use_quantile_norm,
        "relative_actions": list(delta[0].mask) if delta else [],
        "adapt_to_pi": any(t.adapt_to_pi for t in aloha),
        "metadata": config.policy_metadata or {},
    }


def main(job: dict[str, Any]) -> None:
    tensors: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {}
    for name in CONFIGURATIONS:
        config = training.get_config(name)
        data = config.data.create(config.assets_dirs, config.model)
        stats = {
            key: transforms.NormStats(**{k: np.array(v) for k, v in entry.items()})
            for key, entry in statistics().items()
        }
        before = transforms.compose(
            [
                *data.data_transforms.inputs,
                transforms.Normalize(stats, use_quantiles=data.use_quantile_norm),
                *(t for t in data.model_transforms.inputs if not isinstance(t, SKIPPED)),
            ]
        )
        after = transforms.compose(
            [
                *data.model_transforms.outputs,
                transforms.Unnormalize(stats, use_quantiles=data.use_quantile_norm),
                *data.data_transforms.outputs,
            ]
        )
        told[name] = {**described(config, data), "prompts": {}}
        for kind, message in messages(name).items():
            seen = before(copy.deepcopy(message))
            assert seen["state"].shape == (PADDED,)
            given = after({"state": seen["state"].copy(), "actions": chunk()})
            for camera, image in seen["image"].items():
                if seen["image_mask"][camera]:
                    tensors[f"{name}/{kind}/image/{camera}"] = image
            tensors[f"{name}/{kind}/state"] = np.asarray(seen["state"], np.float64)
            tensors[f"{name}/{kind}/actions"] = np.asarray(given["actions"], np.float64)
            prompt = seen.get("prompt")  # without one openpi refuses when it makes tokens
            told[name]["prompts"][kind] = prompt if prompt is None else str(np.asarray(prompt))
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, Path(job["out"]), metadata={"told": json.dumps(told)})


if __name__ == "__main__":
    main(json.load(sys.stdin))
