"""What a request must hold, by the policy's own description, and how robots name it.

Everything a client sends is compared with what the policy needs before any of it reaches the
policy: cameras by name, images by dtype and size, the state by its width, the instruction by its
length.  Whatever is not known is refused, so that a misspelt key is an error and not a default.

Robots of different laboratories name the same things differently.  A *layout* says how:

| layout | images | state |
|---|---|---|
| ``native`` | ``images``: {camera: image}, ``image_masks`` | ``state`` |
| ``aloha`` | ``images``: {``cam_high``, ``cam_left_wrist``, ``cam_right_wrist``} | ``state`` |
| ``libero`` | ``observation/image``, ``observation/wrist_image`` | ``observation/state`` |
| ``droid`` | ``observation/exterior_image_1_left``, ``observation/wrist_image_left`` |
  ``observation/joint_position``, ``observation/gripper_position`` |

All but the first are openpi's (``policies/aloha_policy.py``, ``libero_policy.py``,
``droid_policy.py``), and take images as its clients send them: bytes, or floating-point numbers in
[0, 1], which are cut off to bytes; channels first in ``aloha``, either way in the others.  An ALOHA
may have no wrist cameras, and a ``cam_low`` is not looked at.

Beside the observation a request may carry ``request_id``, ``deadline_ms``, ``age_ms``, ``noise``,
and the left-over of its robot's last chunk as ``previous`` with ``delay``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ObservationError, PolicyError, ServingError
from omega_qvla.real_time_chunking import LeftOver, left_over_of

Array = npt.NDArray[Any]

MAX_IMAGE_SIDE = 4096
MAX_PROMPT_CHARACTERS = 2000
MAX_REQUEST_ID_CHARACTERS = 64
_PROMPT = "prompt"
CONTROL = ("request_id", "deadline_ms", "age_ms", "noise", "previous", "delay")
"""What a request may carry beside the observation."""


@dataclass(frozen=True)
class Layout:
    """How a robot names what a policy needs.

    Attributes:
        images: key → camera of the policy; empty for ``native``.
        state: keys whose values, one after the other, are the state.
        axes: of an image: channels last, first, or first where there are three rows of them.
        within: the key of the map that images are in; None for the message itself.
        optional: cameras that a robot may not have.
        unread: keys of images that nothing reads.
    """

    images: Mapping[str, str]
    state: tuple[str, ...]
    axes: Literal["hwc", "chw", "either"] = "hwc"
    within: str | None = None
    optional: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()

    @property
    def own(self) -> bool:
        """Whether it is this project's."""
        return not self.images


NATIVE = Layout({}, ("state",), within="images")
LAYOUTS: dict[str, Layout] = {
    "native": NATIVE,
    "aloha": Layout(
        {
            "cam_high": "base_0_rgb",
            "cam_left_wrist": "left_wrist_0_rgb",
            "cam_right_wrist": "right_wrist_0_rgb",
        },
        ("state",),
        axes="chw",
        within="images",
        optional=frozenset({"left_wrist_0_rgb", "right_wrist_0_rgb"}),
        unread=frozenset({"cam_low"}),
    ),
    "libero": Layout(
        {"observation/image": "base_0_rgb", "observation/wrist_image": "left_wrist_0_rgb"},
        ("observation/state",),
        axes="either",
    ),
    "droid": Layout(
        {
            "observation/exterior_image_1_left": "base_0_rgb",
            "observation/wrist_image_left": "left_wrist_0_rgb",
        },
        ("observation/joint_position", "observation/gripper_position"),
        axes="either",
    ),
}


@dataclass(frozen=True)
class Specification:
    """What a policy needs and gives.

    Attributes:
        cameras: names, in the policy's order.
        state_dim: numbers of the state.
        horizon: actions in a chunk.
        action_dim: numbers of an action, in the robot's units.
        noise_shape: (horizon, width) of the noise sampling starts from.
        state_parts, action_parts: named pieces and their widths, one after the other.
        layout: how the robot names things.
        default_prompt: the instruction of a request that has none.
        reset_pose: joints of an arm at the start of an episode, for the client.
        decisions: what was decided about the checkpoint, question → answer.
    """

    cameras: tuple[str, ...]
    state_dim: int
    horizon: int
    action_dim: int
    noise_shape: tuple[int, int]
    state_parts: tuple[tuple[str, int], ...] = ()
    action_parts: tuple[tuple[str, int], ...] = ()
    layout: Layout = NATIVE
    default_prompt: str | None = None
    reset_pose: tuple[float, ...] = ()
    decisions: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """The layout must be one for this policy.

        Raises:
            PolicyError: it names other cameras.
        """
        named, cameras = set(self.layout.images.values()), set(self.cameras)
        if named and not named - self.layout.optional <= cameras <= named:
            raise PolicyError(
                f"this layout has the cameras {sorted(named)}, the policy {sorted(self.cameras)}; "
                "choose another `layout`"
            )

    def dump(self) -> dict[str, Any]:
        """For the metadata that a client gets first."""
        return {
            "cameras": list(self.cameras),
            "state_dim": self.state_dim,
            "horizon": self.horizon,
            "action_dim": self.action_dim,
            "noise_shape": list(self.noise_shape),
            "image_keys": dict(self.layout.images) or None,
            "image_map": self.layout.within,
            "image_axes": self.layout.axes,
            "state_keys": list(self.layout.state),
            "default_prompt": self.default_prompt,
            "state_parts": [list(part) for part in self.state_parts],
            "action_parts": [list(part) for part in self.action_parts],
            "decisions": dict(self.decisions),
        }


@dataclass(frozen=True)
class Request:
    """One request for actions, checked.

    Attributes:
        observation: as policies take it: ``images``, ``image_masks``, ``state``, ``prompt``.
        request_id: the client's own name for it, or None.
        deadline_s: how old the observation may be when the actions leave; None: the server's.
        age_s: how old it was already when it was sent.
        noise: what sampling starts from, or None.
        left_over: what the new chunk continues, or None.
    """

    observation: Mapping[str, Any]
    request_id: str | int | None = None
    deadline_s: float | None = None
    age_s: float = 0.0
    noise: Array | None = field(default=None, repr=False)
    left_over: LeftOver | None = field(default=None, repr=False)


def parse_request(message: Mapping[str, Any], specification: Specification) -> Request:
    """A request out of a decoded message.

    Raises:
        ServingError: ``bad_request``; says which key is wrong, what was expected and found.
    """
    layout = specification.layout
    images = (*layout.images, *layout.unread) if layout.within is None else (layout.within,)
    masks_key = ("image_masks",) if layout.own else ()
    known = {*images, *masks_key, *layout.state, _PROMPT, *CONTROL}
    unknown = [key for key in message if key not in known]
    if unknown:
        raise _bad(f"unknown keys {_listed(unknown)}; known are {_listed(sorted(known))}")
    if layout.own:
        pictures: Any = message.get("images")
        masks = _masks(message.get("image_masks", {}), specification)
    else:
        pictures, masks = _renamed(message, specification)
    observation = {
        "images": _images(pictures, masks, specification),
        "image_masks": masks,
        "state": _state([message.get(key) for key in layout.state], specification),
        "prompt": _prompt(message.get(_PROMPT), specification),
    }
    deadline = message.get("deadline_ms")
    return Request(
        observation,
        _request_id(message.get("request_id")),
        None if deadline is None else _milliseconds("deadline_ms", deadline),
        _milliseconds("age_ms", message.get("age_ms", 0.0)),
        _noise(message.get("noise"), specification),
        _left_over(message.get("previous"), message.get("delay"), specification),
    )


def _renamed(
    message: Mapping[str, Any], specification: Specification
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Images under the policy's names, and which of its cameras the robot does not have."""
    layout = specification.layout
    found: Any = message if layout.within is None else message.get(layout.within)
    if not isinstance(found, Mapping):
        raise _bad(f"'{layout.within}' must map the cameras {_listed(list(layout.images))}")
    named = cast(Mapping[Any, Any], found)
    if layout.within is not None:
        unknown = [key for key in named if key not in layout.images and key not in layout.unread]
        if unknown:
            raise _bad(
                f"'{layout.within}' has unknown cameras {_listed(unknown)}; known are "
                f"{_listed([*layout.images, *sorted(layout.unread)])}"
            )
    pictures = {
        camera: named[key] for key, camera in layout.images.items() if named.get(key) is not None
    }
    absent = layout.optional & set(specification.cameras) - set(pictures)
    return pictures, dict.fromkeys(sorted(absent), False)


def _masks(value: Any, specification: Specification) -> dict[str, bool]:
    masks = cast(dict[Any, Any], value) if isinstance(value, dict) else None
    if masks is None or not all(isinstance(on, bool | np.bool_) for on in masks.values()):
        raise _bad("'image_masks' must map camera names to true or false")
    unknown = [name for name in masks if name not in specification.cameras]
    if unknown:
        raise _bad(
            f"'image_masks' has unknown cameras {_listed(unknown)}; the policy has "
            f"{_listed(specification.cameras)}"
        )
    return {str(name): bool(on) for name, on in masks.items()}


def _images(value: Any, masks: Mapping[str, bool], specification: Specification) -> dict[str, Any]:
    wanted = [name for name in specification.cameras if masks.get(name, True)]
    if not isinstance(value, dict):
        raise _bad(f"'images' must map the cameras {_listed(wanted)} to images")
    images = cast(dict[Any, Any], value)
    missing = [name for name in wanted if name not in images]
    extra = [name for name in images if name not in specification.cameras]
    if missing or extra or not wanted:
        raise _bad(
            f"wrong cameras: missing {_listed(missing)}, unknown {_listed(extra)}; the policy has "
            f"{_listed(specification.cameras)}"
        )
    layout = specification.layout
    return {name: _image(name, images[name], layout) for name in wanted}


def _image(name: str, value: Any, layout: Layout) -> Array:
    if not isinstance(value, np.ndarray):
        raise _bad(f"image {name!r} must be an array, found {type(value).__name__}")
    image = cast(Array, value)
    if not layout.own:
        image = _as_openpi(name, image, layout)
    right = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if not right or not all(1 <= side <= MAX_IMAGE_SIDE for side in image.shape[:2]):
        raise _bad(
            f"image {name!r} must be uint8 [height, width, 3] with sides of 1 to {MAX_IMAGE_SIDE}; "
            f"found {image.dtype} {list(image.shape)}"
        )
    return image.copy()  # PyTorch wants memory of its own, which the message's is not


def _as_openpi(name: str, image: Array, layout: Layout) -> Array:
    """An image of openpi's clients as bytes with channels last, as far as its shape allows."""
    if image.ndim == 3 and np.issubdtype(image.dtype, np.floating):
        if not bool(((image >= 0.0) & (image <= 1.0)).all()):
            raise _bad(f"image {name!r} is floating point and not within 0 and 1")
        image = (255 * image).astype(np.uint8)
    if layout.axes == "chw" and (image.ndim != 3 or image.shape[0] != 3):
        raise _bad(
            f"image {name!r} must have its channels first, [3, height, width], in this layout; "
            f"found {list(image.shape)}"
        )
    return np.moveaxis(image, 0, -1) if image.ndim == 3 and image.shape[0] == 3 else image


def _state(values: Sequence[Any], specification: Specification) -> Array:
    keys = specification.layout.state
    pieces = [_numbers(f"'{key}'", value) for key, value in zip(keys, values, strict=True)]
    state = np.concatenate([np.atleast_1d(piece) for piece in pieces])
    if state.shape != (specification.state_dim,):
        raise _bad(
            f"{_listed(keys)} must hold {specification.state_dim} numbers, found {state.size}"
        )
    return state


def _numbers(where: str, value: Any) -> Array:
    """A number or a vector of numbers that are finite in float32; as exact as they were sent."""
    if value is None:
        raise _bad(f"{where} is missing")
    plain = isinstance(value, list) and all(
        type(item) in (int, float) for item in cast(list[Any], value)
    )
    if not plain and not isinstance(value, np.ndarray | np.generic | float | int):
        raise _bad(f"{where} must be numbers, found {type(value).__name__}")
    exact = np.asarray(value, dtype=np.float64)
    with np.errstate(over="ignore"):  # what becomes infinite is found below
        numbers = exact.astype(np.float32)
    if numbers.ndim > 1:
        raise _bad(f"{where} must be a vector, found shape {list(numbers.shape)}")
    if not np.isfinite(numbers).all():
        places = np.flatnonzero(~np.isfinite(np.atleast_1d(numbers)))[:8].tolist()
        raise _bad(f"{where} has NaN or Inf at {places}")
    return exact


def _prompt(value: Any, specification: Specification) -> str:
    if value is None and specification.default_prompt is not None:
        return specification.default_prompt
    if isinstance(value, bytes) and not specification.layout.own:
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise _bad("'prompt' is bytes that are no UTF-8") from None
    if not isinstance(value, str) or not value.strip():
        raise _bad("'prompt' must be a sentence")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise _bad(
            f"'prompt' has {len(value)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted"
        )
    return value


def _request_id(value: Any) -> str | int | None:
    value = _plain(value)
    if value is None or type(value) is int:
        return value
    if isinstance(value, str) and len(value) <= MAX_REQUEST_ID_CHARACTERS:
        return value
    raise _bad(
        f"'request_id' must be an integer or a text of at most {MAX_REQUEST_ID_CHARACTERS} "
        "characters"
    )


def _milliseconds(key: str, value: Any) -> float:
    """Seconds."""
    value = _plain(value)
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0.0:
        raise _bad(f"'{key}' must be a number of milliseconds, 0 or more")
    return min(float(value), 1e9) / 1e3


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _noise(value: Any, specification: Specification) -> Array | None:
    if value is None:
        return None
    shape = specification.noise_shape
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != np.float32:
        raise _bad(f"'noise' must be float32 {list(shape)}")
    noise = cast(Array, value)
    if not np.isfinite(noise).all():
        raise _bad("'noise' has NaN or Inf")
    return noise.copy()


def _left_over(previous: Any, delay: Any, specification: Specification) -> LeftOver | None:
    if previous is not None:
        most = specification.horizon, specification.action_dim
        array = cast(Array, previous) if isinstance(previous, np.ndarray) else None
        if array is None or array.dtype != np.float32 or array.ndim != 2:
            raise _bad(f"'previous' must be float32 [at most {most[0]}, {most[1]}]")
        if len(array) > most[0] or array.shape[1] != most[1]:
            raise _bad(
                f"'previous' must be [at most {most[0]}, {most[1]}], found {list(array.shape)}"
            )
    try:
        return left_over_of(previous, _plain(delay))
    except ObservationError as error:
        raise _bad(str(error)) from error


def _bad(message: str) -> ServingError:
    return ServingError("bad_request", message)


def _listed(names: Sequence[Any]) -> str:
    """Names in an error message: at most eight, each short, printable whatever they hold."""
    shown = [text if len(text := ascii(name)) <= 60 else f"{text[:57]}..." for name in names[:8]]
    return f"[{', '.join(shown)}{', ...' if len(names) > 8 else ''}]"
