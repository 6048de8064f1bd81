"""pi0.5 as a step of openpi's JAX trainer (``paligemma/jax_arrays.py``)."""

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
from omega_qvla.policies.pi05.checkpoints.openpi import published_processor, state_of
from omega_qvla.policies.pi05.checkpoints.openpi_training import PUBLISHED
from omega_qvla.policies.pi05.policy import Pi05Policy

PROJECTIONS = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")


def is_openpi_jax(directory: Path, content: Content | None) -> bool:
    """Whether a directory is a step of a pi0.5 training in JAX."""
    return content is None and is_step_with(directory, "time_mlp_in/kernel")


def stream_openpi_jax(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A policy from a step of openpi's JAX trainer, its weights left in the files.

    Raises:
        PolicyError: a file is missing or damaged, an array is missing, unexpected or misshaped, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library is missing.
    """
    training = training_config(options.training_config, directory, PUBLISHED)
    arrays = SavedArrays(directory)
    stored = map_parameters(arrays, network_rules(PROJECTIONS, adaptive=True), training.lora)
    processor = published_processor(directory, options, training, network_sizes(arrays))
    state = state_of(training)
    decisions = published_decisions("openpi, JAX", processor.config, state, options)
    policy = Pi05Policy.of_processor(processor)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)
