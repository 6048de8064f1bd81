"""A step of openpi's JAX trainer: ``params/`` and ``assets/<id>/norm_stats.json``.

``params`` are the weights for inference (the averaged ones where the training averages), as
``training/checkpoints.py`` saves them.  Sizes are read off the arrays (``jax_arrays.py``); the rest
is in openpi's code and told by the training configuration, as for its PyTorch checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax_arrays import SavedArrays
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.policies.paligemma.jax_arrays import map_parameters, network_rules, network_sizes
from omega_qvla.policies.paligemma.openpi_training import (
    Published,
    TrainingConfig,
    training_config,
)
from omega_qvla.policies.paligemma.sizes import Sizes

LAYOUT = "openpi, JAX"
CHOICES = frozenset({"training_config", "tokenizer"})
"""What such a step leaves open."""


class Step(NamedTuple):
    """What a step and its user say of a policy."""

    training: TrainingConfig
    stored: StoredTensors
    sizes: Sizes


def open_step(
    directory: Path,
    options: CheckpointOptions,
    published: Published,
    projections: Iterable[str],
    *,
    adaptive: bool,
) -> Step:
    """A step, its weights left in the files.

    Args:
        directory: the step.
        options: name the training configuration.
        published: openpi's configurations of the network.
        projections: the network's linears beside PaliGemma and the action expert.
        adaptive: whether a linear makes the scales of the expert's norms.

    Raises:
        PolicyError: a file is missing or damaged, an array is missing, unexpected or misshaped, or
            the training configuration is not told, not known, or another policy's.
        MissingPackageError: tensorstore is not installed.
    """
    training = training_config(options.training_config, directory, published)
    arrays = SavedArrays(directory)
    rules = network_rules(projections, adaptive=adaptive)
    return Step(training, map_parameters(arrays, rules, training.lora), network_sizes(arrays))
