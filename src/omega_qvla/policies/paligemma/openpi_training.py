"""What openpi keeps in its training code rather than in the checkpoint.

The facts are those of openpi's ``training/config.py`` and ``policies/*_policy.py``: how many
actions are predicted, which of the padded dimensions belong to the robot, which cameras are filled,
whether the state is written into the prompt, and which actions are differences from the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.errors import PolicyError
from omega_qvla.policies.paligemma.jax_arrays import Lora, LoraVariant, Part
from omega_qvla.policies.processing.relative_actions import Mask
from omega_qvla.policies.processing.robots import ALOHA_DIM, Robot

BASE, LEFT, RIGHT = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"
"""openpi's names of the network's cameras."""


LIBERO, DROID = Robot(layout="libero"), Robot(layout="droid")


class TrainingConfig(BaseModel):
    """Everything about an openpi policy that its tensors do not show.

    Attributes:
        horizon: actions in a chunk (``action_horizon``).
        state_in_prompt: ``discrete_state_input``, of pi0.5; None where the network has a token for
            the state.
        state_dim: numbers of the robot's state, before padding.
        robot_action_dim: numbers of an action, before padding.
        cameras: images the robot has, under the network's names; the others are masked.
        prompt_length: ``max_token_len``; openpi's default for the network where it is None.
        asset_id: folder of the statistics below ``assets``, where there are several.
        relative_actions: of the first actions, which are differences from the state (the mask of
            ``DeltaActions``).
        lora: adapters in a JAX checkpoint, by the Gemma they are in: openpi's variant, or the
            ``LoRAConfig`` of its attention.
        robot: its conventions, see ``robots.py``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    horizon: int = Field(ge=1, le=10_000)
    state_in_prompt: bool | None = None
    state_dim: int = Field(ge=1)
    robot_action_dim: int = Field(ge=1)
    cameras: tuple[str, ...] = Field(min_length=1)
    prompt_length: int | None = Field(default=None, ge=1)
    asset_id: str | None = None
    relative_actions: Mask = ()
    lora: dict[Part, LoraVariant | Lora] = Field(default_factory=dict[Part, "LoraVariant | Lora"])
    robot: Robot = Robot()


ALOHA_ACTIONS: Mask = 2 * (*[True] * 6, False)
"""Joints are differences from the state, grippers are not."""


def aloha(
    horizon: int,
    default_prompt: str | None = None,
    *,
    cameras: tuple[str, ...] = (BASE, LEFT, RIGHT),
    asset_id: str = "trossen",
    relative_actions: Mask = ALOHA_ACTIONS,
    reset_pose: tuple[float, ...] = (),
    state_in_prompt: bool | None = None,
) -> TrainingConfig:
    """What ``LeRobotAlohaDataConfig`` says; the arguments are those that configurations differ in.

    Args:
        horizon, cameras, asset_id, relative_actions, state_in_prompt: see ``TrainingConfig``.
        default_prompt, reset_pose: see ``Robot``.
    """
    return TrainingConfig(
        horizon=horizon,
        state_in_prompt=state_in_prompt,
        state_dim=ALOHA_DIM,
        robot_action_dim=ALOHA_DIM,
        cameras=cameras,
        asset_id=asset_id,
        relative_actions=relative_actions,
        robot=Robot(
            layout="aloha",
            adapt_to_pi=True,
            default_prompt=default_prompt,
            reset_pose=reset_pose,
        ),
    )


RESET_POSE = (0.0, -1.5, 1.5, 0.0, 0.0, 0.0)
"""``policy_metadata`` of openpi's ALOHA policies."""


class Published(NamedTuple):
    """openpi's own configurations of one network.

    Attributes:
        title: of the network.
        known: name → what it says.
        unsupported: name → why it is refused: running it would give wrong actions.
    """

    title: str
    known: Mapping[str, TrainingConfig]
    unsupported: Mapping[str, str]


def training_config(choice: str | None, directory: Path, published: Published) -> TrainingConfig:
    """The training configuration of an openpi checkpoint, as its user named it.

    Raises:
        PolicyError: nothing was named, or the name or file is not known, valid or supported.
    """
    known = ", ".join(published.known)
    if choice is None:
        # openpi's trainer saves below checkpoints/<configuration>/<experiment>/<step>.
        likely = [name for name in directory.resolve().parts if name in published.known]
        hint = f". A folder of its path is called {likely[-1]}" if likely else ""
        raise PolicyError(
            f"no config.json in {directory} says how the policy was trained (horizon, cameras, "
            "robot dimensions, whether the state is in the prompt): openpi keeps that in its code. "
            f"Name the training configuration ({known}), or a JSON file with "
            f"{', '.join(TrainingConfig.model_fields)}: --training-config, or "
            f"CheckpointOptions(training_config=...){hint}"
        )
    if choice in published.known:
        return published.known[choice]
    if choice in published.unsupported:
        raise PolicyError(
            f"training configuration {choice} is not supported: {published.unsupported[choice]}"
        )
    path = Path(choice)
    if path.suffix != ".json":
        raise PolicyError(
            f"unknown training configuration {choice!r} of {published.title}; known: {known}, or "
            "a .json file"
        )
    try:
        return TrainingConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PolicyError(f"cannot read the training configuration {path}: {error}") from error
