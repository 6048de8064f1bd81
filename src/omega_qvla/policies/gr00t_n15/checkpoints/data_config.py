"""What Isaac-GR00T keeps in its data configurations rather than in the checkpoint.

``experiment/data_config.py`` and ``examples/Libero/custom_data_config.py`` of the N1.5 release fix,
under a name given on the command line, which parts of state and action a robot has, in which order
they are concatenated, how each is normalized, and which cameras are shown.  The statistics
themselves are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.errors import PolicyError

Mode = Literal["min_max", "mean_std", "binary", "sine_cosine", "unchanged"]


class DataConfig(BaseModel):
    """One robot's view of a GR00T policy.

    Attributes:
        cameras: video keys, in the order their tokens enter the prompt.
        state, actions: parts in the order they are concatenated, and how each is normalized.
        image_crop: share of each side that is kept.
        horizon: actions in a chunk.
        instruction: ``listed`` as Isaac-GR00T's own inference shows it, or ``plain``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    cameras: tuple[str, ...] = Field(min_length=1)
    state: dict[str, Mode] = Field(min_length=1)
    actions: dict[str, Mode] = Field(min_length=1)
    image_crop: float = Field(default=0.95, gt=0.0, le=1.0)
    horizon: int = Field(default=16, ge=1)
    instruction: Literal["plain", "listed"] = "listed"


def _all(mode: Mode, keys: Sequence[str]) -> dict[str, Mode]:
    return dict.fromkeys(keys, mode)


_GR1 = ("left_arm", "right_arm", "left_hand", "right_hand")
_SO100 = ("single_arm", "gripper")
_G1 = ("left_arm", "right_arm", "left_hand", "right_hand")
_G1_BODY = ("left_leg", "right_leg", "waist", *_G1)
_AGIBOT = (
    "left_arm_joint_position",
    "right_arm_joint_position",
    "left_effector_position",
    "right_effector_position",
    "head_position",
    "waist_position",
)
_LIBERO = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")

DATA_CONFIGS: dict[str, DataConfig] = {
    "fourier_gr1_arms_only": DataConfig(
        cameras=("ego_view",), state=_all("sine_cosine", _GR1), actions=_all("min_max", _GR1)
    ),
    "fourier_gr1_arms_waist": DataConfig(
        cameras=("ego_view",),
        state=_all("sine_cosine", (*_GR1, "waist")),
        actions=_all("min_max", (*_GR1, "waist")),
    ),
    "fourier_gr1_full_upper_body": DataConfig(
        cameras=("front_view",),
        state=_all("min_max", (*_GR1, "waist", "neck")),
        actions=_all("min_max", (*_GR1, "waist", "neck")),
    ),
    "so100": DataConfig(
        cameras=("webcam",), state=_all("min_max", _SO100), actions=_all("min_max", _SO100)
    ),
    "so100_dualcam": DataConfig(
        cameras=("front", "wrist"), state=_all("min_max", _SO100), actions=_all("min_max", _SO100)
    ),
    "unitree_g1": DataConfig(
        cameras=("rs_view",), state=_all("min_max", _G1), actions=_all("min_max", _G1)
    ),
    "unitree_g1_full_body": DataConfig(
        cameras=("rs_view",), state=_all("min_max", _G1_BODY), actions=_all("min_max", _G1)
    ),
    "agibot_genie1": DataConfig(
        cameras=("top_head", "hand_left", "hand_right"),
        state=_all("min_max", _AGIBOT),
        actions=_all("min_max", (*_AGIBOT, "robot_velocity")),
    ),
    "libero": DataConfig(
        cameras=("image", "wrist_image"),
        state=_all("min_max", _LIBERO),
        actions=_all("min_max", _LIBERO),
    ),
    "libero_mean_std": DataConfig(
        cameras=("image", "wrist_image"),
        state=_all("min_max", _LIBERO),
        actions=_all("mean_std", _LIBERO[:-1]) | _all("min_max", _LIBERO[-1:]),
    ),
}
"""Names of Isaac-GR00T's configurations; ``libero_mean_std`` is ``LiberoDataConfigMeanStd``."""

UNSUPPORTED = (
    "bimanual_panda_gripper",
    "bimanual_panda_hand",
    "single_panda_gripper",
    "oxe_droid",
)
"""Names that are refused: they convert rotations between representations."""


def data_config(choice: str | None, directory: Path) -> DataConfig:
    """The data configuration of a GR00T checkpoint, as its user named it.

    Raises:
        PolicyError: nothing was named, or the name or file is not known, valid or supported.
    """
    known = ", ".join(DATA_CONFIGS)
    if choice is None:
        raise PolicyError(
            f"{directory} does not say how state and actions are put together and normalized: "
            f"Isaac-GR00T keeps that in its data configurations. Name one ({known}), or a JSON "
            f"file with {', '.join(DataConfig.model_fields)}: --data-config, or "
            "CheckpointOptions(data_config=...)"
        )
    if choice in DATA_CONFIGS:
        return DATA_CONFIGS[choice]
    if choice in UNSUPPORTED:
        raise PolicyError(
            f"data configuration {choice} is not supported: it converts rotations between "
            "representations"
        )
    path = Path(choice)
    if path.suffix != ".json":
        raise PolicyError(f"unknown data configuration {choice!r}; known: {known}, or a .json file")
    try:
        return DataConfig.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise PolicyError(f"cannot read the data configuration {path}: {error}") from error
