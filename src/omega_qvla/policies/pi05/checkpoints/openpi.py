"""openpi's PyTorch layout: ``model.safetensors`` and ``assets/<id>/norm_stats.json``.

openpi keeps most of a policy in its training code.  Two forms are read:

* **as published**, by openpi's converter and trainer: sizes come from the tensors
  (``pi05_sizes.py``), the rest from the training configuration that the user names
  (``openpi_training.py``).  A ``config.json`` of the converter must agree with it;
* **self-contained**, as the embedded policies are: ``config.json`` is ``Pi05Config`` as JSON, and
  ``tokenizer.json`` describes a closed vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from omega_qvla.checkpoints.files import read_bytes, read_json
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import is_orbax
from omega_qvla.checkpoints.stored_tensors import INDEX, WEIGHTS, find_tensors, write_weights
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip_checkpoints import official_names
from omega_qvla.policies.pi05.checkpoints.openpi_training import TrainingConfig, training_config
from omega_qvla.policies.pi05.checkpoints.sizes import TIE, TOWER, Sizes, infer_sizes
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import dropped_shapes
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer
from omega_qvla.policies.processing.tokenizers import load_tokenizer

CONFIG, TOKENIZER, STATISTICS = "config.json", "tokenizer.json", "norm_stats.json"


def is_openpi(directory: Path, content: Mapping[str, Any] | None) -> bool:
    """Whether a directory is openpi's, or self-contained in its layout."""
    if content is None:
        weights = any((directory / name).exists() for name in (WEIGHTS, INDEX))
        return weights or not is_orbax(directory)
    if content.get("family", Pi05Policy.family) != Pi05Policy.family:
        return False
    return "paligemma_variant" in content or (directory / "assets").exists()


def stream_openpi(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A policy from a directory in openpi's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, the weights do not fit the configuration, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    content = read_json(directory, CONFIG) if (directory / CONFIG).exists() else {}
    stored = official_names(find_tensors(directory), TOWER, TIE, options.tied)
    if "vision" in content or content.get("family") == Pi05Policy.family:
        processor, decisions = _self_contained(directory), {}
    else:
        training = training_config(options.training_config, directory)
        sizes = infer_sizes(stored)
        _require_agreement(directory, content, training, sizes, options)
        processor = published_processor(directory, options, training, sizes)
        decisions = published_decisions("openpi, PyTorch", processor.config, options)
    policy = Pi05Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)


def published_decisions(
    layout: str, config: Pi05Config, options: CheckpointOptions
) -> dict[str, str]:
    """What the user's training configuration says of how the policy is shown the world."""
    own = f"the robot's {config.state_dim} numbers"
    return {
        "layout": layout,
        "training configuration": str(options.training_config),
        "state in the prompt": own if config.state_in_prompt else "none",
        "images": "padded to a square with -1 (black)",
        "cameras": ", ".join(config.cameras),
        "actions": "absolute",
    }


def _self_contained(directory: Path) -> Pi05Processor:
    config = parse_config(read_bytes(directory, CONFIG), str(directory / CONFIG))
    described = load_tokenizer(read_json(directory, TOKENIZER), TOKENIZER, _attachments(directory))
    return Pi05Processor(config, _statistics(directory, None), described)


def _require_agreement(
    directory: Path,
    converted: Mapping[str, Any],
    training: TrainingConfig,
    sizes: Sizes,
    options: CheckpointOptions,
) -> None:
    """Hold the ``config.json`` of openpi's converter against what else is known.

    Raises:
        PolicyError: they differ.
    """
    for key, ours in (("action_horizon", training.horizon), ("action_dim", sizes.action_dim)):
        if converted.get(key, ours) != ours:
            raise PolicyError(
                f"{directory / CONFIG} has {key} {converted[key]}, the training configuration "
                f"{options.training_config} and the tensors say {ours}: it is another policy's"
            )


def published_processor(
    directory: Path, options: CheckpointOptions, training: TrainingConfig, sizes: Sizes
) -> Pi05Processor:
    """The processor, and with it the configuration, of a policy as openpi publishes it.

    Args:
        directory: with ``assets``.
        options: the tokenizer, and the name of the training configuration.
        training: what openpi keeps in its code.
        sizes: what the tensors say.

    Raises:
        PolicyError: the two do not go together, statistics are missing or too few, or there is no
            tokenizer.
        ResourceError: a library for the tokenizer is missing.
    """
    if training.robot_action_dim > sizes.action_dim:
        raise PolicyError(
            f"{directory} gives {sizes.action_dim} numbers per action, the training configuration "
            f"{options.training_config} has a robot of {training.robot_action_dim} "
            "(robot_action_dim): it is another policy's"
        )
    try:
        config = Pi05Config(
            **sizes._asdict(),
            horizon=training.horizon,
            robot_action_dim=training.robot_action_dim,
            state_dim=training.state_dim,
            cameras=training.cameras,
            prompt_length=training.prompt_length,
            state_in_prompt=training.state_in_prompt,
            image_fit="antialiased",
        )
    except ValidationError as error:
        raise PolicyError(f"{directory} is no pi0.5 policy: {error}") from error
    return Pi05Processor(
        config,
        _statistics(directory, training.asset_id),
        paligemma_tokenizer(directory, options.tokenizer),
    )


def write_openpi(
    policy: Pi05Policy,
    directory: Path,
    *,
    asset_id: str = "metaworld",
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a full-precision policy in the layout ``stream_openpi`` reads.

    Args:
        policy: what to write.
        directory: created if needed.
        asset_id: folder of the normalization statistics.
        dtype: of the stored weights; they are float32 in memory.
    """
    assets = directory / "assets" / asset_id
    assets.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(policy.config.model_dump_json(indent=1) + "\n")
    (directory / TOKENIZER).write_text(json.dumps(policy.processor.tokenizer.dump()) + "\n")
    for name, content in policy.processor.tokenizer.files().items():
        (directory / name).write_bytes(content)
    (assets / STATISTICS).write_text(policy.processor.statistics.dump() + "\n")
    write_weights(policy.module, directory, dtype)


def parse_config(text: str | bytes, where: str) -> Pi05Config:
    """``Pi05Config`` from JSON.

    Raises:
        PolicyError: not JSON, or not a valid configuration.
    """
    try:
        return Pi05Config.model_validate_json(text)
    except ValidationError as error:
        raise PolicyError(f"{where} is not a pi0.5 configuration: {error}") from error


def _statistics(directory: Path, asset_id: str | None) -> NormalizationStatistics:
    """The statistics of the named robot, or the only ones there are where none is named.

    Raises:
        PolicyError: the named robot's are not there, or there are several and none is named.
    """
    assets = directory / "assets"
    found = {
        path.parent.relative_to(assets).as_posix(): path.relative_to(directory).as_posix()
        for path in sorted(assets.rglob(STATISTICS))
    }
    there = ", ".join(found) or "none"
    if asset_id is not None and asset_id not in found:
        raise PolicyError(
            f"{assets} has no {asset_id}/{STATISTICS}, the statistics that the training "
            f"configuration names (asset_id); it has those of: {there}. If the policy was trained "
            "with those, give a training configuration of your own, a JSON file with that asset_id"
        )
    if asset_id is None and len(found) != 1:
        raise PolicyError(
            f"{assets} must hold exactly one */{STATISTICS}, found {len(found)}: {there}"
        )
    name = found[next(iter(found)) if asset_id is None else asset_id]
    return NormalizationStatistics.parse(read_bytes(directory, name), str(directory / name))


def _attachments(directory: Path) -> dict[str, bytes]:
    """Vocabulary files beside ``tokenizer.json``, which a dump may refer to."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
    return {name: read_bytes(directory, name) for name in names if (directory / name).exists()}
