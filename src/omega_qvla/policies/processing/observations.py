"""What a policy requires of an observation: images, state and prompt, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from omega_qvla.errors import ObservationError
from omega_qvla.policies.guidance import Guidance


class Encoded(NamedTuple):
    """One observation as a policy computes with it.

    Attributes:
        inputs: what the network reads, one row each.
        anchor: [state_dim] float32, what relative actions are counted from; None where actions are
            absolute.
        guidance: one row of what the chunk continues; None where it begins anew.
    """

    inputs: Sequence[Tensor]
    anchor: np.ndarray | None
    guidance: Guidance | None = None


def require_images(observation: Mapping[str, Any], cameras: Sequence[str]) -> list[np.ndarray]:
    """The images of the cameras that are switched on, in the policy's order.

    ``observation["images"]`` maps camera names to uint8 [H, W, 3]; an optional
    ``observation["image_masks"]`` maps names to False for cameras to be left out.

    Raises:
        ObservationError: a camera is missing, unknown or misshaped.
    """
    images = observation.get("images")
    if not isinstance(images, Mapping):
        raise ObservationError(
            f"the observation needs 'images', a mapping with {list(cameras)}; it has "
            f"{sorted(map(str, observation))}"
        )
    masks = observation.get("image_masks", {})
    if not isinstance(masks, Mapping):
        raise ObservationError("'image_masks' must map camera names to True or False")
    wanted = [name for name in cameras if masks.get(name, True)]
    missing = [name for name in wanted if name not in images]
    extra = [name for name in images if name not in cameras]
    if missing or extra or not wanted:
        raise ObservationError(
            f"observation images must be {list(cameras)}; missing {missing}, unknown {extra} "
            "(set image_masks[name] = False to leave a camera out)"
        )
    return [_checked_image(name, images[name]) for name in wanted]


def _checked_image(name: str, value: Any) -> np.ndarray:
    try:
        image = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"image {name!r} is not an array: {error}") from error
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ObservationError(
            f"image {name!r} must be uint8 [height, width, 3]; got {image.dtype} "
            f"{list(image.shape)}"
        )
    return image


def require_state(
    observation: Mapping[str, Any], width: int, dtype: type[np.floating[Any]] = np.float32
) -> np.ndarray:
    """The robot's state [width].

    Args:
        observation: from the robot.
        width: of its state.
        dtype: of what is returned.

    Raises:
        ObservationError: missing, misshaped or not finite.
    """
    if "state" not in observation:
        raise ObservationError(
            f"the observation needs 'state' [{width}]; it has {sorted(map(str, observation))}"
        )
    try:
        state = np.asarray(observation["state"], dtype=dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"'state' is not numeric: {error}") from error
    if state.shape != (width,):
        raise ObservationError(f"'state' must have shape [{width}], got {list(state.shape)}")
    if not np.isfinite(state).all():
        raise ObservationError(f"'state' has NaN or Inf at {np.flatnonzero(~np.isfinite(state))}")
    return state


def require_prompt(observation: Mapping[str, Any]) -> str:
    """The instruction.

    Raises:
        ObservationError: missing or not text.
    """
    prompt = observation.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ObservationError("the observation needs 'prompt', a non-empty sentence")
    return prompt
