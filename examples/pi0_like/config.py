"""What fixes the shape and the conventions of a policy like pi0."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.siglip import VisionConfig


class Pi0LikeConfig(BaseModel):
    """Sizes and conventions; ``depth`` counts the layers of the backbone and of the expert."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: Literal["pi0_like"] = "pi0_like"
    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    depth: int
    vocabulary: int
    horizon: int
    action_dim: int
    robot_action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    prompt_length: int
    steps: int = 10

    @classmethod
    def tiny(cls, vocabulary: int) -> Pi0LikeConfig:
        """Small enough for a test: two 28-pixel cameras, four layers."""
        return cls(
            vision=VisionConfig(width=64, hidden=128, heads=2, depth=2, image_size=28),
            backbone=GemmaConfig(width=128, hidden=256, heads=2, head_dim=64),
            expert=GemmaConfig(width=64, hidden=128, heads=2, head_dim=64),
            depth=4,
            vocabulary=vocabulary,
            horizon=6,
            action_dim=4,
            robot_action_dim=4,
            state_dim=4,
            cameras=("base", "wrist"),
            prompt_length=64,
            steps=4,
        )
