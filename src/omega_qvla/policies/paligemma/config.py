"""What fixes the shape and the conventions of a policy on PaliGemma."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.processing.images import ImageFit
from omega_qvla.policies.processing.relative_actions import Mask
from omega_qvla.policies.processing.robots import ALOHA_DIM, Robot


class PaligemmaConfig(BaseModel):
    """What pi0 and pi0.5 both have.

    Attributes:
        depth: layers of the backbone and of the action expert (they are paired, so equal).
        action_dim: width of the action vector the network sees (padded for the full model).
        robot_action_dim: how many of those belong to the robot.
        state_dim: width of the robot's state.
        cameras: image names in the order their tokens enter the prefix.
        prompt_length: maximum number of prompt tokens; longer prompts are refused.
        steps: default number of denoising steps.
        image_fit: how images are fitted into the square, see ``images.py``.
        relative_actions: which of the robot's actions are relative to its state, see
            ``relative_actions.py``.
        robot: conventions of the robot, see ``robots.py``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    family: str
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
    image_fit: ImageFit = "bilinear"
    relative_actions: Mask = ()
    robot: Robot = Robot()

    @model_validator(mode="after")
    def _relative_actions_must_have_a_state(self) -> PaligemmaConfig:
        if len(self.relative_actions) > min(self.state_dim, self.robot_action_dim):
            raise ValueError(
                f"{len(self.relative_actions)} actions may be relative to the state, but the robot "
                f"has {self.robot_action_dim} actions and {self.state_dim} numbers of state"
            )
        return self

    @model_validator(mode="after")
    def _attention_must_match(self) -> PaligemmaConfig:
        ours, theirs = self.backbone, self.expert
        if (ours.heads, ours.kv_heads, ours.head_dim) != (
            theirs.heads,
            theirs.kv_heads,
            theirs.head_dim,
        ):
            raise ValueError("the expert attends to the backbone's keys: heads must be the same")
        return self

    @model_validator(mode="after")
    def _aloha_has_two_arms(self) -> PaligemmaConfig:
        widths = {self.state_dim, self.robot_action_dim}
        if self.robot.adapt_to_pi and widths != {ALOHA_DIM}:
            raise ValueError(
                f"adapt_to_pi converts an ALOHA of {ALOHA_DIM} joints and grippers; this robot has "
                f"{self.state_dim} numbers of state and {self.robot_action_dim} of an action"
            )
        return self

    @property
    def tokens_per_image(self) -> int:
        return self.vision.tokens_per_image


def full_sizes(horizon: int, cameras: int) -> dict[str, Any]:
    """The sizes of the published policies, SigLIP So400m/14 and Gemma 2B beside 300M."""
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    return {
        "vision": VisionConfig(width=1152, hidden=4304, heads=16, depth=27, image_size=224),
        "backbone": GemmaConfig(width=2048, hidden=16384, heads=8, head_dim=256),
        "expert": GemmaConfig(width=1024, hidden=4096, heads=8, head_dim=256),
        "depth": 18,
        "vocabulary": 257152,
        "horizon": horizon,
        "action_dim": 32,
        "robot_action_dim": 32,
        "state_dim": 32,
        "cameras": names[:cameras],
    }


def tiny_sizes(vocabulary: int, horizon: int, action_dim: int) -> dict[str, Any]:
    """The same graph with about 5 M parameters and two 84-pixel cameras."""
    return {
        "vision": VisionConfig(width=192, hidden=384, heads=3, depth=4, image_size=84),
        "backbone": GemmaConfig(width=192, hidden=512, heads=4, head_dim=64),
        "expert": GemmaConfig(width=128, hidden=384, heads=4, head_dim=64),
        "depth": 5,
        "vocabulary": vocabulary,
        "horizon": horizon,
        "action_dim": action_dim,
        "robot_action_dim": action_dim,
        "state_dim": 4,
        "cameras": ("base", "wrist"),
        "prompt_length": 32,
    }
