"""What Isaac-GR00T N1.5's robots send and expect: observations, actions, modalities.

| key of the observation | value |
|---|---|
| ``video.CAMERA`` | uint8 [1, H, W, 3] or [H, W, 3] |
| ``state.PART`` | numbers [1, width] or [width] |
| ``annotation.…`` | the instruction, or a list with it |
| ``request_id``, ``deadline_ms``, ``age_ms``, ``noise`` | as over the websocket |
| ``meta`` | true: the answer has a map ``meta`` |

The last two lines are ours.  They are in the observation because that is what the published client
lets a robot fill: it builds the rest of the request itself.

The answer holds ``action.PART`` [horizon, width] float32, and beside them nothing, because robots
take every key for an action (``eval/wrappers/multistep_wrapper.py`` slices each value).  Request
id, artifact, age and timing are therefore under ``meta``, and only where the request asks for it.

A robot may also ask what the policy takes (``get_modality_config``).  N1.5 answers a map of its
``ModalityConfig`` (``data/dataset.py``: time steps relative to now, and keys), each as
``{"__ModalityConfig_class__": true, "as_json": text}`` (``eval/service.py``), which is plain data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError
from omega_qvla.serving.wire.specification import CONTROL, Request, Specification, parse_request

Array = npt.NDArray[Any]

INSTRUCTION = "annotation.human.action.task_description"
"""What most of N1.5's data configurations call the instruction; any other annotation is taken."""


def observation_of(call: Mapping[str, Any]) -> dict[Any, Any]:
    """What a call of ``get_action`` brings.

    Raises:
        ServingError: ``bad_request``; it brings no map.
    """
    data = call.get("data")
    if not isinstance(data, dict):
        raise _bad("'data' must be an observation, a map")
    return cast(dict[Any, Any], data)


def parse_observation(data: Mapping[Any, Any], specification: Specification) -> Request:
    """A request out of GR00T's observation.

    Raises:
        ServingError: ``bad_request``; says which key is wrong.
    """
    images: dict[str, Any] = {}
    state: dict[str, Any] = {}
    prompts: list[Any] = []
    control: dict[str, Any] = {}
    for key, value in data.items():
        kind, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
        if kind == "video":
            images[name] = _one_frame(key, value)
        elif kind == "state":
            state[name] = value
        elif kind == "annotation":
            prompts.append(value)
        elif key in CONTROL:
            control[key] = value
        elif key != "meta" or not isinstance(value, bool):
            raise _bad(
                f"unknown key {ascii(key)[:60]}; known are video.*, state.*, annotation.*, "
                f"{', '.join(CONTROL)} and meta (true or false)"
            )
    if len(prompts) != 1:
        raise _bad(f"one annotation.* must hold the instruction, found {len(prompts)}")
    return parse_request(
        {
            "images": images,
            "state": _joined(state, specification),
            "prompt": _one_text(prompts[0]),
            **control,
        },
        specification,
    )


def _one_frame(key: str, value: Any) -> Any:
    """The single time step of a video."""
    if isinstance(value, np.ndarray) and value.ndim == 4:
        frames = cast(Array, value)
        if len(frames) != 1:
            raise _bad(f"{ascii(key)[:60]} has {len(frames)} time steps; this policy takes one")
        return frames[0]
    return value


def _one_text(value: Any) -> Any:
    if isinstance(value, list) and len(cast(list[Any], value)) == 1:
        return cast(list[Any], value)[0]
    return value


def _joined(state: Mapping[str, Any], specification: Specification) -> Array:
    """The state's parts, in the policy's order."""
    parts = _state_parts(specification)
    expected = [name for name, _ in parts]
    if set(state) != set(expected):
        shown = [ascii(name)[:40] for name in list(state)[:16]]
        raise _bad(f"the state has the parts {shown}, the policy needs {expected}")
    pieces: list[Array] = []
    for name, width in parts:
        value = state[name]
        if not isinstance(value, np.ndarray):
            raise _bad(f"state.{name} must be an array, found {type(value).__name__}")
        piece = cast(Array, value)
        if piece.shape not in ((width,), (1, width)):
            raise _bad(f"state.{name} must have shape [1, {width}], found {list(piece.shape)}")
        pieces.append(piece.reshape(width))
    with np.errstate(over="ignore"):
        return np.concatenate(pieces).astype(np.float32)


def action_parts(actions: Array, specification: Specification) -> dict[str, Any]:
    """A chunk [H, A] as GR00T's named parts."""
    parts = _action_parts(specification)
    ends = np.cumsum([width for _, width in parts])[:-1]
    pieces = np.split(actions, ends, axis=1)
    return {f"action.{name}": piece for (name, _), piece in zip(parts, pieces, strict=True)}


def modality_configs(specification: Specification) -> dict[str, Any]:
    """What the policy takes and gives, as N1.5 describes it.

    Observations are of the present (index 0); action i of a chunk is for i steps from now.
    """
    states = [f"state.{name}" for name, _ in _state_parts(specification)]
    actions = [f"action.{name}" for name, _ in _action_parts(specification)]
    return {
        "video": _modality([f"video.{camera}" for camera in specification.cameras], [0]),
        "state": _modality(states, [0]),
        "action": _modality(actions, range(specification.horizon)),
        "language": _modality([INSTRUCTION], [0]),
    }


def _modality(keys: Sequence[str], indices: Sequence[int]) -> dict[str, Any]:
    fields = {"delta_indices": list(indices), "modality_keys": list(keys)}
    return {"__ModalityConfig_class__": True, "as_json": json.dumps(fields)}


def _state_parts(specification: Specification) -> Sequence[tuple[str, int]]:
    return specification.state_parts or (("state", specification.state_dim),)


def _action_parts(specification: Specification) -> Sequence[tuple[str, int]]:
    return specification.action_parts or (("action", specification.action_dim),)


def _bad(message: str) -> ServingError:
    return ServingError("bad_request", message)
