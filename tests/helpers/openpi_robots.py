"""What robots send to openpi's server, for every kind of robot that its configurations know.

Only numpy is imported here: the file is read in openpi's environment too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

CONFIGURATIONS = (
    "pi0_aloha",
    "pi0_aloha_towel",
    "pi0_aloha_tupperware",
    "pi0_aloha_pen_uncap",
    "pi0_aloha_sim",
    "pi0_droid",
    "pi0_droid_jointpos_polaris",
    "pi0_droid_jointpos_100k_polaris",
    "pi0_libero",
    "pi0_libero_low_mem_finetune",
    "pi05_aloha",
    "pi05_aloha_pen_uncap",
    "pi05_droid",
    "pi05_droid_finetune",
    "pi05_full_droid_finetune",
    "pi05_droid_jointpos_polaris",
    "pi05_libero",
)
"""All of openpi's that are of pi0 or pi0.5 and of a robot."""
PADDED = 32
ROWS = 3
"""Actions of a chunk that are compared; the rest of a horizon is treated alike."""


def statistics() -> dict[str, dict[str, list[float]]]:
    """``norm_stats`` of 32 dimensions, one of which never moved."""
    source = np.random.default_rng(3)
    found = {}
    for key in ("state", "actions"):
        middle, spread = source.normal(0.0, 0.4, PADDED), source.uniform(0.5, 1.5, PADDED)
        spread[4] = 0.0
        found[key] = {
            "mean": middle.tolist(),
            "std": (0.5 * spread).tolist(),
            "q01": (middle - 1.2 * spread).tolist(),
            "q99": (middle + spread).tolist(),
        }
    return found


def chunk() -> np.ndarray:
    """What a network gives, [ROWS, 32] float32."""
    return np.random.default_rng(4).normal(0.0, 0.6, (ROWS, PADDED)).astype(np.float32)


def messages(name: str) -> dict[str, dict[str, Any]]:
    """What clients may send to the policy of a configuration, by what is special about it."""
    if "aloha" in name:
        return _aloha(wrists="sim" not in name)
    return _droid() if "droid" in name else _libero()


def _image(source: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return source.integers(0, 256, shape, dtype=np.uint8)


def _aloha(*, wrists: bool) -> dict[str, dict[str, Any]]:
    source, shape = np.random.default_rng(5), (3, 6, 8)
    high = _image(source, shape)
    left, right, low = (_image(source, shape) for _ in range(3))
    state = source.uniform(-1.5, 1.5, 14)
    state[[6, 13]] = 0.31, 0.87
    opened = state.copy()
    opened[[6, 13]] = 1.0, 0.999999  # where the gripper's sine is flat
    beyond = state.astype(np.float32)
    beyond[[6, 13]] = -0.05, 1.2
    alone = {"state": state, "images": {"cam_high": high}, "prompt": "fold_the towel"}
    found = {
        "one camera": alone,
        "open grippers, no prompt": {"state": opened, "images": {"cam_high": high}},
        "floating point": {
            **alone,
            "state": beyond,
            "images": {"cam_high": (high / 255.0).astype(np.float32)},
        },
    }
    if wrists:
        every = {"cam_high": high, "cam_left_wrist": left, "cam_right_wrist": right}
        found["all cameras"] = {**alone, "images": {**every, "cam_low": low}}
        found["one wrist"] = {**alone, "images": {"cam_high": high, "cam_right_wrist": right}}
    return found


def _droid() -> dict[str, dict[str, Any]]:
    source = np.random.default_rng(6)
    base = {
        "observation/exterior_image_1_left": _image(source, (6, 8, 3)),
        "observation/wrist_image_left": _image(source, (6, 8, 3)),
        "observation/joint_position": source.uniform(-2.0, 2.0, 7),
        "observation/gripper_position": np.array([0.25]),
        "prompt": "put the marker in the cup",
    }
    first = {
        "observation/exterior_image_1_left": _image(source, (3, 6, 8)) / np.float32(255.0),
        "observation/gripper_position": np.float64(0.75),
        "prompt": b"put the marker in the cup",
    }
    return {"bytes": base, "channels first, in floating point": {**base, **first}}


def _libero() -> dict[str, dict[str, Any]]:
    source = np.random.default_rng(7)
    base = {
        "observation/image": _image(source, (6, 8, 3)),
        "observation/wrist_image": _image(source, (6, 8, 3)),
        "observation/state": source.uniform(-1.0, 1.0, 8),
        "prompt": "pick up the black bowl",
    }
    first = {"observation/image": _image(source, (3, 6, 8)) / np.float64(255.0)}
    return {"bytes": base, "channels first, in floating point": {**base, **first}}
