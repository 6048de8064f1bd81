"""pi0.5 as the rest of the project sees it."""

from __future__ import annotations

from omega_qvla.policies.family import CheckpointLayout, Family
from omega_qvla.policies.paligemma.libero import LIBERO
from omega_qvla.policies.paligemma.network import dropped_parameters
from omega_qvla.policies.paligemma.openpi_jax import CHOICES
from omega_qvla.policies.paligemma.processing import reading_bytes
from omega_qvla.policies.pi05.checkpoints.lerobot import stream_lerobot_pi05
from omega_qvla.policies.pi05.checkpoints.openpi import is_openpi, stream_openpi
from omega_qvla.policies.pi05.checkpoints.openpi_jax import is_openpi_jax, stream_openpi_jax
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processing import Pi05Processor
from omega_qvla.policies.processing.tokenizers import ByteTokenizer


def _sized(config: Pi05Config) -> Pi05Policy:
    """A policy that reads bytes, tensors on the meta device."""
    processor = reading_bytes(Pi05Processor, config)
    return Pi05Policy.of_processor(processor, dropped_parameters=dropped_parameters(config))


FAMILY = Family(
    policy=Pi05Policy,
    title="pi0.5",
    sizes={
        "pi05": lambda: _sized(Pi05Config.full()),
        # As it runs LIBERO: two cameras, ten actions.
        "pi05-libero": lambda: _sized(Pi05Config.full(horizon=10, cameras=2)),
        "tiny-pi05": lambda: _sized(Pi05Config.tiny(vocabulary=ByteTokenizer.size)),
    },
    embedded={"tiny-pi05": "tiny_pi05"},
    layouts=(
        CheckpointLayout(
            "openpi's pi0.5 (there is no config.json that names another)",
            stream_openpi,
            frozenset({"training_config", "tokenizer", "tied"}),
            is_openpi,
        ),
        CheckpointLayout(
            "a step of openpi's JAX trainer",
            stream_openpi_jax,
            CHOICES,
            is_openpi_jax,
        ),
        CheckpointLayout(
            "LeRobot's pi05",
            stream_lerobot_pi05,
            frozenset({"tokenizer", "written_by", "ignore_settings", "base", "tied"}),
            lerobot_type="pi05",
        ),
    ),
    libero=LIBERO,
)
