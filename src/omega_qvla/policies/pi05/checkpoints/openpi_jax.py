"""A step of openpi's JAX trainer: ``params/`` and ``assets/<id>/norm_stats.json``.

``params`` are the weights for inference (the averaged ones where the training averages), as
``training/checkpoints.py`` saves them.  Sizes are read off the arrays, heads included; what else a
policy is made of is in openpi's code, and told by the training configuration as for its PyTorch
checkpoints.
"""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import array_paths, is_orbax
from omega_qvla.checkpoints.orbax_arrays import SavedArrays
from omega_qvla.policies.family import Content
from omega_qvla.policies.layers.paligemma_jax import (
    EMBEDDING,
    Rule,
    as_it_is,
    dense,
    gemma_rules,
    gemma_sizes,
    layer_count,
    map_parameters,
    shapes_of,
    vision_rules,
    vision_sizes,
)
from omega_qvla.policies.pi05.checkpoints.openpi import published_decisions, published_processor
from omega_qvla.policies.pi05.checkpoints.openpi_training import training_config
from omega_qvla.policies.pi05.checkpoints.sizes import EMBEDDING as EMBED_TOKENS
from omega_qvla.policies.pi05.checkpoints.sizes import EXPERT, LANGUAGE, PROJECTOR, VISION, Sizes
from omega_qvla.policies.pi05.network import dropped_shapes
from omega_qvla.policies.pi05.policy import Pi05Policy

_PROJECTIONS = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")


def is_openpi_jax(directory: Path, content: Content | None) -> bool:
    """Whether a directory is a step of a pi0.5 training in JAX."""
    if content is not None or not is_orbax(directory):
        return False
    return "time_mlp_in/kernel" in array_paths(directory)


def stream_openpi_jax(directory: Path, options: CheckpointOptions) -> Pi05Policy:
    """A policy from a step of openpi's JAX trainer, its weights left in the files.

    Raises:
        PolicyError: a file is missing or damaged, an array is missing, unexpected or misshaped, or
            something has to be chosen that ``options`` leaves open.
        ResourceError: a library is missing.
    """
    training = training_config(options.training_config, directory)
    arrays = SavedArrays(directory)
    rules = [
        *vision_rules(VISION, PROJECTOR),
        Rule(EMBEDDING, EMBED_TOKENS, as_it_is),
        *gemma_rules("backbone", LANGUAGE, adaptive=False),
        *gemma_rules("expert", EXPERT, adaptive=True),
        *(rule for name in _PROJECTIONS for rule in dense(name, name)),
    ]
    stored = map_parameters(arrays, rules, training.lora)
    shape = shapes_of(arrays)
    sizes = Sizes(
        vision=vision_sizes(shape),
        backbone=gemma_sizes(shape, "backbone"),
        expert=gemma_sizes(shape, "expert"),
        depth=layer_count(shape),
        vocabulary=shape(EMBEDDING, 2)[0],
        action_dim=shape("action_out_proj/kernel", 2)[1],
    )
    processor = published_processor(directory, options, training, sizes)
    policy = Pi05Policy.of_processor(processor)
    decisions = published_decisions("openpi, JAX", processor.config, options)
    return policy.read_from(stored, dropped_shapes(processor.config), decisions)
