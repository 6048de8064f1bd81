"""pi0 as the rest of the project sees it."""

from __future__ import annotations

from omega_qvla.policies.family import CheckpointLayout, Family
from omega_qvla.policies.paligemma.libero import LIBERO
from omega_qvla.policies.paligemma.network import dropped_parameters
from omega_qvla.policies.paligemma.openpi_jax import CHOICES
from omega_qvla.policies.paligemma.processing import reading_bytes
from omega_qvla.policies.pi0.checkpoints.lerobot import stream_lerobot_pi0
from omega_qvla.policies.pi0.checkpoints.openpi import is_openpi, stream_openpi
from omega_qvla.policies.pi0.checkpoints.openpi_jax import is_openpi_jax, stream_openpi_jax
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.policy import Pi0Policy
from omega_qvla.policies.pi0.processing import Pi0Processor
from omega_qvla.policies.processing.tokenizers import ByteTokenizer


def _sized(config: Pi0Config) -> Pi0Policy:
    """A policy that reads bytes, tensors on the meta device."""
    processor = reading_bytes(Pi0Processor, config)
    return Pi0Policy.of_processor(processor, dropped_parameters=dropped_parameters(config))


FAMILY = Family(
    policy=Pi0Policy,
    title="pi0",
    sizes={
        "pi0": lambda: _sized(Pi0Config.full()),
        # As it runs LIBERO: two cameras.
        "pi0-libero": lambda: _sized(Pi0Config.full(cameras=2)),
        "tiny-pi0": lambda: _sized(Pi0Config.tiny(vocabulary=ByteTokenizer.size)),
    },
    layouts=(
        CheckpointLayout(
            "openpi's pi0",
            stream_openpi,
            frozenset({"training_config", "tokenizer", "tied"}),
            is_openpi,
        ),
        CheckpointLayout(
            "a step of openpi's JAX trainer, pi0",
            stream_openpi_jax,
            CHOICES,
            is_openpi_jax,
        ),
        CheckpointLayout(
            "LeRobot's pi0",
            stream_lerobot_pi0,
            frozenset({"tokenizer", "written_by", "ignore_settings", "base", "tied"}),
            lerobot_type="pi0",
        ),
    ),
    libero=LIBERO,
)
