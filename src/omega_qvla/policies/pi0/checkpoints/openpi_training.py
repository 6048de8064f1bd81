"""openpi's training configurations of pi0 (``training/config.py``)."""

from __future__ import annotations

from omega_qvla.policies.paligemma.jax_arrays import LORA_OF_BOTH
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
    horizon=10,
    state_dim=8,
    robot_action_dim=8,
    cameras=(BASE, LEFT),
    asset_id="droid",
    robot=DROID,
)
_LIBERO = TrainingConfig(
    horizon=50,
    state_dim=8,
    robot_action_dim=7,
    cameras=(BASE, LEFT),
    asset_id="physical-intelligence/libero",
    # Actions of LIBERO are differences already; these policies were trained with one more.
    relative_actions=(True,) * 6 + (False,),
    robot=LIBERO,
)
_POLARIS = _DROID.model_copy(
    update={"prompt_length": 100, "relative_actions": (True,) * 7 + (False,)}
)

PUBLISHED = Published(
    "pi0",
    known={
        "pi0_droid": _DROID,
        "pi0_libero": _LIBERO,
        "pi0_libero_low_mem_finetune": _LIBERO.model_copy(update={"lora": LORA_OF_BOTH}),
        "pi0_droid_jointpos_polaris": _POLARIS,
        "pi0_droid_jointpos_100k_polaris": _POLARIS,
        "pi0_aloha": aloha(50, reset_pose=RESET_POSE),
        "pi0_aloha_towel": aloha(50, "fold the towel", reset_pose=RESET_POSE),
        "pi0_aloha_tupperware": aloha(
            50, "open the tupperware and put the food on the plate", reset_pose=RESET_POSE
        ),
        "pi0_aloha_pen_uncap": aloha(50, "uncap the pen"),
        "pi0_aloha_sim": aloha(
            50,
            "Transfer cube",
            cameras=(BASE,),
            asset_id="lerobot/aloha_sim_transfer_cube_human",
            relative_actions=(),
        ),
    },
    unsupported={
        "pi0_base": "it is no training configuration but the weights others start from, for no "
        "particular robot: describe yours in a JSON file",
    },
)
