"""pi0 in openpi's PyTorch layout, as its converter and trainer save it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.shapes import Shapes
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.errors import PolicyError
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi import (
    CONFIG,
    STATE_TOKEN,
    has_state_token,
    is_openpi_layout,
    openpi_tensors,
    published_decisions,
    published_fields,
    read_statistics,
    require_agreement,
)
from omega_qvla.policies.paligemma.openpi_training import TrainingConfig, training_config
from omega_qvla.policies.paligemma.sizes import Sizes, infer_sizes
from omega_qvla.policies.pi0.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi0.processing import Pi0Processor
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.published_tokenizers import paligemma_tokenizer

PROMPT_LENGTH = 48
"""openpi's ``max_token_len`` of pi0."""
STATE = "a token of its own, not in the prompt"


def is_openpi(directory: Path, content: Mapping[str, Any] | None) -> bool:
    """Whether a directory is openpi's and pi0's."""
    named = content is not None and "family" in content  # by this project, in its own layout
    ours = not named and is_openpi_layout(directory, content, Pi0Policy.family)
    return ours and has_state_token(directory)


def stream_openpi(directory: Path, options: CheckpointOptions) -> Pi0Policy:
    """A policy from a directory in openpi's layout, its weights left in the file.

    Raises:
        PolicyError: a file is missing or invalid, the weights do not fit the configuration, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library for the tokenizer is missing.
    """
    content = read_json(directory, CONFIG) if (directory / CONFIG).exists() else {}
    stored = openpi_tensors(directory, options)
    training = training_config(options.training_config, directory, PUBLISHED)
    sizes = infer_sizes(stored)
    require_agreement(directory, content, training, sizes, options)
    processor = published_processor(directory, options, training, sizes, padded_state_dim(stored))
    decisions = published_decisions("openpi, PyTorch", processor.config, STATE, options)
    policy = Pi0Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)


def padded_state_dim(stored: StoredTensors) -> int:
    """Width of the state that the network reads.

    Raises:
        PolicyError: the tensor that tells is missing or misshaped.
    """
    return Shapes(stored)(STATE_TOKEN, 2)[1]


def published_processor(
    directory: Path,
    options: CheckpointOptions,
    training: TrainingConfig,
    sizes: Sizes,
    padded_state_dim: int,
) -> Pi0Processor:
    """How a published policy is shown the world.

    Raises:
        PolicyError: the training configuration is another network's, or statistics or tokenizer
            are missing or invalid.
        ResourceError: a library for the tokenizer is missing.
    """
    if training.state_in_prompt:
        raise PolicyError(
            f"the training configuration {options.training_config} has state_in_prompt, and pi0 "
            "reads the state as a token of its own: leave it out"
        )
    if training.state_dim > padded_state_dim:
        raise PolicyError(
            f"the training configuration {options.training_config} has a state of "
            f"{training.state_dim} numbers, the weights ({STATE_TOKEN}) read {padded_state_dim}: "
            "it is another policy's"
        )
    config = Pi0Config(
        **published_fields(training, sizes),
        prompt_length=training.prompt_length or PROMPT_LENGTH,
        padded_state_dim=padded_state_dim,
    )
    # openpi normalizes pi0 by mean and deviation, its later policies by quantiles.
    statistics = read_statistics(directory, training.asset_id, NormalizationStatistics.parse_means)
    return Pi0Processor(config, statistics, paligemma_tokenizer(directory, options.tokenizer))
