"""pi0.5 in openpi's PyTorch layout.

Two forms are read:

* **as published**, by openpi's converter and trainer (``paligemma/openpi.py``);
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
from omega_qvla.checkpoints.stored_tensors import write_weights
from omega_qvla.errors import PolicyError
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi import (
    CONFIG,
    STATISTICS,
    has_state_token,
    is_openpi_layout,
    openpi_tensors,
    published_decisions,
    published_fields,
    read_statistics,
    require_agreement,
)
from omega_qvla.policies.paligemma.openpi_training import TrainingConfig, training_config
from omega_qvla.policies.paligemma.sizes import Sizes, infer_sizes, require_tensor
from omega_qvla.policies.pi05.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import ADAPTIVE_NORM
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer
from omega_qvla.policies.processing.tokenizers import load_tokenizer

TOKENIZER = "tokenizer.json"
PROMPT_LENGTH = 200
"""openpi's ``max_token_len`` of pi0.5."""


def is_openpi(directory: Path, content: Mapping[str, Any] | None) -> bool:
    """Whether a directory is openpi's and not pi0's, or self-contained in its layout."""
    ours = is_openpi_layout(directory, content, Pi05Policy.family)
    return ours and not has_state_token(directory)


def stream_openpi(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A policy from a directory in openpi's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, the weights do not fit the configuration, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    content = read_json(directory, CONFIG) if (directory / CONFIG).exists() else {}
    stored = openpi_tensors(directory, options)
    if "vision" in content or content.get("family") == Pi05Policy.family:
        processor, decisions = _self_contained(directory), {}
    else:
        training = training_config(options.training_config, directory, PUBLISHED)
        require_tensor(stored, ADAPTIVE_NORM, "pi0.5")
        sizes = infer_sizes(stored)
        require_agreement(directory, content, training, sizes, options)
        processor = published_processor(directory, options, training, sizes)
        state = state_of(training)
        decisions = published_decisions("openpi, PyTorch", processor.config, state, options)
    policy = Pi05Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)


def state_of(training: TrainingConfig) -> str:
    """What the prompt has of the state, in words."""
    return f"the robot's {training.state_dim} numbers" if training.state_in_prompt else "none"


def _self_contained(directory: Path) -> Pi05Processor:
    config = parse_config(read_bytes(directory, CONFIG), str(directory / CONFIG))
    described = load_tokenizer(read_json(directory, TOKENIZER), TOKENIZER, _attachments(directory))
    statistics = read_statistics(directory, None, NormalizationStatistics.parse)
    return Pi05Processor(config, statistics, described)


def published_processor(
    directory: Path, options: CheckpointOptions, training: TrainingConfig, sizes: Sizes
) -> Pi05Processor:
    """How a published policy is shown the world.

    Raises:
        PolicyError: statistics or tokenizer are missing or invalid.
        ResourceError: a library for the tokenizer is missing.
    """
    if training.state_in_prompt is None:
        raise PolicyError(
            f"the training configuration {options.training_config} has to say state_in_prompt "
            "(openpi's discrete_state_input): whether the state of this pi0.5 is in its prompt"
        )
    config = Pi05Config(
        **published_fields(training, sizes),
        prompt_length=training.prompt_length or PROMPT_LENGTH,
        state_in_prompt=training.state_in_prompt,
    )
    statistics = read_statistics(directory, training.asset_id, NormalizationStatistics.parse)
    return Pi05Processor(config, statistics, paligemma_tokenizer(directory, options.tokenizer))


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


def _attachments(directory: Path) -> dict[str, bytes]:
    """Vocabulary files beside ``tokenizer.json``, which a dump may refer to."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
    return {name: read_bytes(directory, name) for name in names if (directory / name).exists()}
