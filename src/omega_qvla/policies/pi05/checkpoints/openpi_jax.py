"""pi0.5 as a step of openpi's JAX trainer (``paligemma/openpi_jax.py``)."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import is_step_with
from omega_qvla.policies.family import Content
from omega_qvla.policies.paligemma.network import dropped_shapes
from omega_qvla.policies.paligemma.openpi import published_decisions
from omega_qvla.policies.paligemma.openpi_jax import LAYOUT, open_step
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
        PolicyError, ResourceError: as ``open_step``; or statistics or tokenizer are missing.
    """
    step = open_step(directory, options, PUBLISHED, PROJECTIONS, adaptive=True)
    processor = published_processor(directory, options, step.training, step.sizes)
    config, state = processor.config, state_of(step.training)
    policy = Pi05Policy.of_processor(processor)
    decisions = published_decisions(LAYOUT, config, state, options)
    return policy.read_from(step.stored, dropped_shapes(config), decisions)
