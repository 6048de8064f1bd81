"""pi0 as a step of openpi's JAX trainer (``paligemma/jax_arrays.py``)."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import is_step_with
from omega_qvla.checkpoints.orbax_arrays import SavedArrays
from omega_qvla.policies.family import Content
from omega_qvla.policies.paligemma.jax_arrays import map_parameters, network_rules, network_sizes
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi import published_decisions
from omega_qvla.policies.paligemma.openpi_training import training_config
from omega_qvla.policies.pi0.checkpoints.openpi import STATE, padded_state_dim, published_processor
from omega_qvla.policies.pi0.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi0.policy import Pi0Policy

PROJECTIONS = (
    "state_proj",
    "action_in_proj",
    "action_out_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
)


def is_openpi_jax(directory: Path, content: Content | None) -> bool:
    """Whether a directory is a step of a pi0 training in JAX."""
    return content is None and is_step_with(directory, "state_proj/kernel")


def stream_openpi_jax(directory: Path, options: CheckpointOptions) -> Pi0Policy:
    """A policy from a step of openpi's JAX trainer, its weights left in the files.

    Raises:
        PolicyError: a file is missing or damaged, an array is missing, unexpected or misshaped, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library is missing.
    """
    training = training_config(options.training_config, directory, PUBLISHED)
    arrays = SavedArrays(directory)
    stored = map_parameters(arrays, network_rules(PROJECTIONS, adaptive=False), training.lora)
    sizes, state = network_sizes(arrays), padded_state_dim(stored)
    processor = published_processor(directory, options, training, sizes, state)
    decisions = published_decisions("openpi, JAX", processor.config, STATE, options)
    policy = Pi0Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)
