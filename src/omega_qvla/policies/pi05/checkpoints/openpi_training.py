"""What openpi keeps in its training code rather than in the checkpoint.

The facts are those of openpi's ``training/config.py`` and ``policies/*_policy.py``: how many
actions are predicted, which of the padded dimensions belong to the robot, which cameras are filled,
and whether the state is written into the prompt.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.paligemma_jax import Lora, LoraVariant, Part

_BASE, _LEFT = "base_0_rgb", "left_wrist_0_rgb"


class TrainingConfig(BaseModel):
    """Everything about an openpi policy that its tensors do not show.

    Attributes:
        horizon: actions in a chunk (``action_horizon``).
        state_in_prompt: ``discrete_state_input``.
        state_dim: numbers of the robot's state, before padding.
        robot_action_dim: numbers of an action, before padding.
        cameras: images the robot has, under the network's names; the others are masked.
        prompt_length: ``max_token_len``.
        asset_id: folder of the statistics below ``assets``, where there are several.
        lora: adapters in a JAX checkpoint, by the Gemma they are in: openpi's variant, or the
            ``LoRAConfig`` of its attention.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    horizon: int = Field(ge=1, le=10_000)
    state_in_prompt: bool
    state_dim: int = Field(ge=1)
    robot_action_dim: int = Field(ge=1)
    cameras: tuple[str, ...] = Field(min_length=1)
    prompt_length: int = Field(default=200, ge=1)
    asset_id: str | None = None
    lora: dict[Part, LoraVariant | Lora] = Field(default_factory=dict[Part, "LoraVariant | Lora"])


TRAINING_CONFIGS: dict[str, TrainingConfig] = {
    "pi05_libero": TrainingConfig(
        horizon=10,
        state_in_prompt=False,
        state_dim=8,
        robot_action_dim=7,
        cameras=(_BASE, _LEFT),
        asset_id="physical-intelligence/libero",
    ),
    "pi05_droid": TrainingConfig(
        horizon=15,
        state_in_prompt=True,
        state_dim=8,
        robot_action_dim=8,
        cameras=(_BASE, _LEFT),
        asset_id="droid",
    ),
    "pi05_droid_finetune": TrainingConfig(
        horizon=16,
        state_in_prompt=True,
        state_dim=8,
        robot_action_dim=8,
        cameras=(_BASE, _LEFT),
        asset_id="droid",
    ),
}
"""Names of openpi's configurations that this version can run."""

UNSUPPORTED: dict[str, str] = {
    "pi05_base": "it is no training configuration but the weights others start from, for no "
    "particular robot: describe yours in a JSON file",
    "pi05_aloha": "its joints and grippers are converted between two conventions",
    "pi05_aloha_pen_uncap": "its joints and grippers are converted between two conventions",
    "pi05_full_droid_finetune": "its actions are differences from the state",
    "pi05_droid_jointpos_polaris": "its actions are differences from the state",
}
"""Names of openpi's that are refused, and why: running them would give wrong actions."""


def training_config(choice: str | None, directory: Path) -> TrainingConfig:
    """The training configuration of an openpi checkpoint, as its user named it.

    Raises:
        PolicyError: nothing was named, or the name or file is not known, valid or supported.
    """
    known = ", ".join(TRAINING_CONFIGS)
    if choice is None:
        # openpi's trainer saves below checkpoints/<configuration>/<experiment>/<step>.
        likely = [name for name in directory.resolve().parts if name in TRAINING_CONFIGS]
        hint = f". A folder of its path is called {likely[-1]}" if likely else ""
        raise PolicyError(
            f"no config.json in {directory} says how the policy was trained (horizon, cameras, "
            "robot dimensions, whether the state is in the prompt): openpi keeps that in its code. "
            f"Name the training configuration ({known}), or a JSON file with "
            f"{', '.join(TrainingConfig.model_fields)}: --training-config, or "
            f"CheckpointOptions(training_config=...){hint}"
        )
    if choice in TRAINING_CONFIGS:
        return TRAINING_CONFIGS[choice]
    if choice in UNSUPPORTED:
        raise PolicyError(
            f"training configuration {choice} is not supported: {UNSUPPORTED[choice]}"
        )
    path = Path(choice)
    if path.suffix != ".json":
        raise PolicyError(
            f"unknown training configuration {choice!r}; known: {known}, or a .json file"
        )
    try:
        return TrainingConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PolicyError(f"cannot read the training configuration {path}: {error}") from error
