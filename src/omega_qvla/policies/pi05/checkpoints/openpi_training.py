"""openpi's training configurations of pi0.5 (``training/config.py``)."""

from __future__ import annotations

from omega_qvla.policies.paligemma.openpi_training import (
    BASE,
    DROID,
    LEFT,
    LIBERO,
    RESET_POSE,
    Published,
    TrainingConfig,
    aloha,
)

_DROID = TrainingConfig(
    horizon=15,
    state_in_prompt=True,
    state_dim=8,
    robot_action_dim=8,
    cameras=(BASE, LEFT),
    asset_id="droid",
    robot=DROID,
)
_JOINTS = {"relative_actions": (True,) * 7 + (False,)}
"""Joint positions are trained as differences, the gripper is not."""

PUBLISHED = Published(
    "pi0.5",
    known={
        "pi05_libero": TrainingConfig(
            horizon=10,
            state_in_prompt=False,
            state_dim=8,
            robot_action_dim=7,
            cameras=(BASE, LEFT),
            asset_id="physical-intelligence/libero",
            robot=LIBERO,
        ),
        "pi05_droid": _DROID,
        "pi05_droid_finetune": _DROID.model_copy(update={"horizon": 16}),
        "pi05_full_droid_finetune": _DROID.model_copy(update={"horizon": 16, **_JOINTS}),
        "pi05_droid_jointpos_polaris": _DROID.model_copy(update=_JOINTS),
        "pi05_aloha": aloha(50, state_in_prompt=True, reset_pose=RESET_POSE),
        "pi05_aloha_pen_uncap": aloha(50, "uncap the pen", state_in_prompt=True),
    },
    unsupported={
        "pi05_base": "it is no training configuration but the weights others start from, for no "
        "particular robot: describe yours in a JSON file",
    },
)
