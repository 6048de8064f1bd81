"""Policy directories of LeRobot 0.6.1 as its own ``save_pretrained`` writes them, shrunken.

Processors are LeRobot's own for each type, with statistics and a small tokenizer that lies in a
folder of its own, under whose path the saved pipelines name it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lerobot_policies
import numpy as np
import torch

WORDS = ("pick", "up", "the", "object", "red", "cube", "open", "drawer", "and", "a", ".", "\n")


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words, as a folder that ``AutoTokenizer`` reads."""
    import tokenizers
    import transformers

    special = ("<pad>", "<eos>", "<unk>", "<bos>")
    vocabulary = {word: number for number, word in enumerate((*special, *WORDS))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 3), ("<eos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>",
    ).save_pretrained(folder)
    return folder


def statistics() -> dict[str, dict[str, torch.Tensor]]:
    """Of a dataset: what normalizing needs, as LeRobot hands it to its processors."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, width in (("observation.state", 8), ("action", 7)):
        spread = torch.linspace(0.5, 2.0, width)
        found[name] = _of_spread(torch.linspace(-0.2, 0.3, width), spread)
    for camera in lerobot_policies.CAMERAS:
        half = torch.full((3, 1, 1), 0.5)
        found[f"observation.images.{camera}"] = _of_spread(half, half / 2)
    return found


def _of_spread(mean: torch.Tensor, spread: torch.Tensor) -> dict[str, torch.Tensor]:
    low, high = mean - 2 * spread, mean + 2 * spread
    return {"mean": mean, "std": spread, "min": low, "max": high, "q01": low, "q99": high}


def write_policy(name: str, directory: Path, *, seed: int = 0) -> Path:
    """A policy directory of one type, and beside it the folder of its tokenizer."""
    import transformers
    from lerobot.policies.factory import make_pre_post_processors

    tokenizer = write_tokenizer(directory.with_name(f"{directory.name}-tokenizer"))
    module: Any = lerobot_policies.build(name, seed)
    module.save_pretrained(directory)
    read = transformers.AutoTokenizer.from_pretrained

    def ours(_name: str, *args: Any, **kwargs: Any) -> Any:
        return read(str(tokenizer), *args, **kwargs)

    with patch.object(transformers.AutoTokenizer, "from_pretrained", ours):
        pair = make_pre_post_processors(module.config, dataset_stats=statistics())
        for pipeline in pair:
            pipeline.save_pretrained(directory)
    path = directory / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    for step in content["steps"]:
        if "tokenizer_name" in step["config"]:
            step["config"]["tokenizer_name"] = str(tokenizer)
    path.write_text(json.dumps(content))
    return directory


def observations(count: int = 4) -> list[dict[str, Any]]:
    """In this project's form, with pixels drawn from a seed."""
    generator = np.random.default_rng(3)
    side = lerobot_policies.SIDE
    return [
        {
            "images": {
                camera: generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                for camera in lerobot_policies.CAMERAS
            },
            "state": generator.normal(size=8).astype(np.float32),
            "prompt": "pick up the red cube",
        }
        for _ in range(count)
    ]
