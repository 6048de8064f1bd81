"""The cases in which LeRobot's pi05 and pi0 and ours are compared, and everything they are made of.

Weights, images, states, noise and statistics come from SHAKE-256 of a name, so that they are the
same numbers in every environment, whatever versions of numpy and torch it has.  Only numpy is
imported here: the file is read in LeRobot's environment too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

STATE_WIDTH, ACTION_WIDTH, PADDED_WIDTH = 8, 7, 32
CAMERAS = ("image", "wrist_image")
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "Gripper_position")
PROMPTS = ("pick up the black bowl", "open the\ntop_drawer of the cabinet ")
"""One observation each; they are batched, so each has its own anchor for relative actions."""
HORIZON, VOCABULARY = 5, 512
FLAT_DIMENSION = 3
"""A dimension of state and action that never moved."""

EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
TIED_HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
OLD, MIDDLE, BEFORE, CURRENT = "0.4.4", "0.5.0", "0.5.1", "0.6.1"
NEWER = "0.6.1 with transformers 5.6.0"
"""Which LeRobot's own requirements do not allow, and which names the vision tower otherwise."""


Policy = Literal["pi05", "pi0"]


@dataclass(frozen=True)
class Case:
    """One checkpoint and two observations of it.

    Attributes:
        name: of its directory, and of the test.
        policy: LeRobot's type.
        written_by: the LeRobot whose code makes the checkpoint.
        base: the case whose pipelines it keeps, as a fine-tune does.
        normalization: of state and actions.
        height, width: of the cameras' images.
        resolution: edge of the network's images.
        steps: denoising steps.
        empty_cameras: placeholders for cameras that the robot does not have.
        relative: whether actions are relative to the state.
        exclude: parts of names of actions that stay absolute.
        names: names of the actions; None where the data set has none.
        golden: whether its record is kept with the tests.
    """

    name: str
    policy: Policy = "pi05"
    written_by: str = CURRENT
    base: str | None = None
    normalization: str = "QUANTILES"
    height: int = 240
    width: int = 320
    resolution: int = 28
    steps: int = 10
    empty_cameras: int = 0
    relative: bool = False
    exclude: tuple[str, ...] = ()
    names: tuple[str, ...] | None = ACTION_NAMES
    golden: bool = True


CASES: tuple[Case, ...] = (
    Case("saved-by-0.6.1"),
    Case("saved-by-0.5.1", written_by=BEFORE),
    Case("saved-by-0.5.0", written_by=MIDDLE),
    Case("saved-by-0.4.4", written_by=OLD),
    Case("saved-with-transformers-5.6", written_by=NEWER),
    Case("fine-tune-of-0.4.4", base="saved-by-0.4.4"),
    Case("fine-tune-of-0.5.0", base="saved-by-0.5.0"),
    Case("square-images", height=256, width=256),
    Case("tall-images", height=320, width=240),
    Case("full-resolution", resolution=224, golden=False),
    Case("mean-std", normalization="MEAN_STD"),
    Case("min-max", normalization="MIN_MAX"),
    Case("quantile-10", normalization="QUANTILE10"),
    Case("identity", normalization="IDENTITY"),
    Case("empty-camera", empty_cameras=1),
    Case("four-steps", steps=4),
    Case("relative", relative=True),
    Case("relative-but-gripper", relative=True, exclude=("gripper",)),
    Case("relative-excluded-unnamed", relative=True, exclude=("gripper",), names=None),
    Case("relative-mean-std", relative=True, exclude=("grip", "YAW"), normalization="MEAN_STD"),
    Case("relative-by-0.5.1", written_by=BEFORE, relative=True, exclude=("gripper",)),
    Case("relative-fine-tune", base="saved-by-0.6.1", relative=True, exclude=("gripper",)),
    Case("pi0-by-0.6.1", policy="pi0", normalization="MEAN_STD"),
    Case("pi0-by-0.5.1", policy="pi0", normalization="MEAN_STD", written_by=BEFORE),
    Case("pi0-by-0.4.4", policy="pi0", normalization="MEAN_STD", written_by=OLD),
    Case("pi0-min-max-four-steps", policy="pi0", normalization="MIN_MAX", steps=4),
    Case(
        "pi0-relative", policy="pi0", normalization="MEAN_STD", relative=True, exclude=("gripper",)
    ),
)


def golden_cases(policy: Policy) -> tuple[Case, ...]:
    """Those of a policy whose records are kept with the tests."""
    return tuple(case for case in CASES if case.golden and case.policy == policy)


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform numbers of zero mean and unit variance, float64, the same for the same name."""
    data = hashlib.shake_256(name.encode()).digest(4 * math.prod(shape))
    unit = np.frombuffer(data, "<u4").astype(np.float64) / 2**32
    return ((2.0 * unit - 1.0) * math.sqrt(3.0)).reshape(shape)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """A parameter under its official name, float32; nothing is left at zero or one.

    The spread is 1/√fan_in, or 0.3 for vectors, around one for the gains of the vision tower.
    """
    source = EMBEDDING if name == TIED_HEAD else name
    if "vision_tower." in source and "vision_tower.vision_model." not in source:  # a newer name
        source = source.replace("vision_tower.", "vision_tower.vision_model.")
    drawn = uniform(f"weight {source}", shape)
    if len(shape) > 1:
        return (drawn / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
    gain = "vision_tower" in name and name.endswith("norm.weight")
    gain = gain or ("layer_norm" in name and name.endswith(".weight"))
    return (drawn * 0.3 + (1.0 if gain else 0.0)).astype(np.float32)


def statistics() -> dict[str, dict[str, np.ndarray]]:
    """Statistics of a data set as LeRobot keeps them, float32 per feature."""
    found = {}
    for feature, width in (("observation.state", STATE_WIDTH), ("action", ACTION_WIDTH)):
        middle = 0.5 * uniform(f"middle {feature}", (width,))
        spread = 1.0 + 0.3 * uniform(f"spread {feature}", (width,))
        spread[FLAT_DIMENSION] = 0.0
        steps = {"min": -2.0, "max": 2.0, "q01": -1.6, "q99": 1.5, "q10": -1.0, "q90": 0.9}
        entry = {name: middle + step * spread for name, step in steps.items()}
        entry |= {"mean": middle + 0.1 * spread, "std": 0.6 * spread}
        found[feature] = {name: value.astype(np.float32) for name, value in entry.items()}
    return found


def observations(case: Case) -> list[dict[str, Any]]:
    """What the robot sees, in our form: images uint8 [H, W, 3], state [8], prompt."""
    seen = []
    size = (case.height, case.width, 3)
    flat = float(statistics()["observation.state"]["mean"][FLAT_DIMENSION])
    for i, prompt in enumerate(PROMPTS):
        images = {}
        for camera in CAMERAS:
            data = hashlib.shake_256(f"image {camera} {i}".encode()).digest(math.prod(size))
            images[camera] = np.frombuffer(data, np.uint8).reshape(size).copy()
        state = uniform(f"state {i}", (STATE_WIDTH,)).astype(np.float32)
        state[FLAT_DIMENSION] = flat
        seen.append({"images": images, "state": state, "prompt": prompt})
    return seen


def noise() -> np.ndarray:
    """What denoising starts from, [observations, horizon, padded width] float32."""
    return uniform("noise", (len(PROMPTS), HORIZON, PADDED_WIDTH)).astype(np.float32)
