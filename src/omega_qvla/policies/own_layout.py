"""This project's own layout of a full-precision policy: complete in itself, nothing to be chosen.

    config.json         the family's configuration, which names the family
    statistics.json     how state and actions are normalized
    tokenizer.json      and the vocabulary files it refers to
    model.safetensors   the family's official keys, without those inference never reads

The JSON files are those an artifact holds (``NativePolicy.describe``).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from omega_qvla.checkpoints.files import read_bytes, read_json
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import find_tensors, write_weights
from omega_qvla.checkpoints.strict import map_strictly
from omega_qvla.policies.families import family_of
from omega_qvla.policies.native import NativePolicy, of_embodiment

CONFIG = "config.json"


def write_own(
    policy: NativePolicy, directory: Path, *, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a full-precision policy in the layout ``stream_own`` reads.

    Args:
        policy: what to write.
        directory: created if needed.
        dtype: of the stored weights; they are float32 in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, files = policy.describe()
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    for name, content in files.items():
        (directory / name).write_bytes(content)
    write_weights(policy.module, directory, dtype)


def stream_own(directory: Path, options: CheckpointOptions) -> NativePolicy:
    """A policy from a directory in this project's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, the weights do not fit the configuration, or it
            has not the embodiment that ``options`` names.
    """
    config = read_json(directory, CONFIG)
    files = {
        path.name: read_bytes(directory, path.name)
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in (".json", ".txt", ".model") and path.name != CONFIG
    }
    policy = family_of(str(config["family"])).policy.skeleton(config, files)
    policy.store = map_strictly(policy.module, find_tensors(directory), dropped={})
    return of_embodiment(policy, options.embodiment)
