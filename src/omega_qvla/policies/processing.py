"""Between the robot's units and the network's: images, state, prompts, actions.

Conventions follow openpi (``transforms.py``, ``tokenizer.py``):

* images are resized with padding to a square and mapped from [0, 255] to [-1, 1];
* state and actions are normalized by quantiles, x ↦ 2 (x - q01)/(q99 - q01 + 1e-6) - 1;
* with ``state_in_prompt`` the normalized state becomes integers of 256 equal bins over [-1, 1]
  (values below the first bin give -1, as in the original) written into the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError

STATE_BINS = 256
_EPSILON = 1e-6
_WORD = re.compile(r"-?\d+|\w+|[^\w\s]")


class Quantiles(BaseModel):
    """1 % and 99 % quantiles per dimension of one quantity, in the robot's units."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    def normalize(self, x: np.ndarray) -> np.ndarray:
        """Robot units [..., n] → about [-1, 1], float32."""
        low, high = self._arrays(x.shape[-1])
        return ((x - low) / (high - low + _EPSILON) * 2.0 - 1.0).astype(np.float32)

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """The inverse of ``normalize``, float32."""
        low, high = self._arrays(x.shape[-1])
        return ((x + 1.0) / 2.0 * (high - low + _EPSILON) + low).astype(np.float32)

    def _arrays(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.q01)[:width], np.asarray(self.q99)[:width]


class NormalizationStatistics(BaseModel):
    """openpi's ``norm_stats.json``: quantiles of the state and of the actions."""

    model_config = ConfigDict(frozen=True)
    state: Quantiles
    actions: Quantiles

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> NormalizationStatistics:
        """Parse openpi's file; ``where`` names it in errors."""
        try:
            content = json.loads(text)
            return cls.model_validate(content["norm_stats"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise PolicyError(
                f"{where} is not an openpi norm_stats.json with q01/q99 for state and actions: "
                f"{error}"
            ) from error

    def dump(self) -> str:
        """The file's text, openpi's layout."""
        return json.dumps({"norm_stats": self.model_dump(mode="json")}, indent=1)


class Tokenizer(Protocol):
    """Text → token ids below ``size``, beginning-of-sequence included."""

    @property
    def size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def dump(self) -> dict[str, Any]: ...


class WordTokenizer:
    """A closed vocabulary of words, integers and punctuation, for the embedded policies."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def size(self) -> int:
        return len(self.vocabulary)

    @classmethod
    def for_instructions(cls, instructions: Sequence[str]) -> WordTokenizer:
        """The vocabulary that covers pi0.5's prompt format around these instructions."""
        words = {"Task", "State", "Action", ":", ",", ";"}
        for instruction in instructions:
            words.update(_WORD.findall(instruction))
        numbers = [str(i) for i in range(-1, STATE_BINS)]
        return cls(["<pad>", "<bos>", *numbers, *sorted(words)])

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            ObservationError: a word is not in the vocabulary.
        """
        words = _WORD.findall(text)
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise ObservationError(
                f"the prompt has words this policy was never taught: {', '.join(unknown[:5])}; "
                f"it knows {', '.join(w for w in self.vocabulary if w.isalpha())}"
            )
        return [self._ids["<bos>"], *(self._ids[word] for word in words)]

    def dump(self) -> dict[str, Any]:
        return {"kind": "words", "vocabulary": list(self.vocabulary)}


class ByteTokenizer:
    """UTF-8 bytes plus an offset; for policies with random weights, which have no vocabulary."""

    size = 3 + 256

    def encode(self, text: str) -> list[int]:
        return [1, *(3 + byte for byte in text.encode("utf-8"))]

    def dump(self) -> dict[str, Any]:
        return {"kind": "bytes"}


def load_tokenizer(content: Mapping[str, Any], where: str) -> Tokenizer:
    """A tokenizer from what its ``dump`` wrote."""
    match content:
        case {"kind": "words", "vocabulary": list(vocabulary)} if (
            all(isinstance(word, str) for word in vocabulary) and "<bos>" in vocabulary
        ):
            return WordTokenizer(vocabulary)
        case {"kind": "bytes"}:
            return ByteTokenizer()
    raise PolicyError(f"{where} does not describe a known tokenizer")


def discretize_state(normalized: np.ndarray) -> list[int]:
    """Normalized state [n] → bin numbers of 256 equal bins over [-1, 1]; below the range is -1."""
    edges = np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]
    return [int(i) for i in np.digitize(normalized, bins=edges) - 1]


def format_prompt(instruction: str, state_bins: Sequence[int] | None) -> str:
    """pi0.5's prompt; without state bins, openpi's plain form ending in a newline."""
    text = instruction.strip().replace("_", " ").replace("\n", " ")
    if state_bins is None:
        return f"{text}\n"
    return f"Task: {text}, State: {' '.join(map(str, state_bins))};\nAction: "


def resize_with_padding(image: np.ndarray, size: int) -> Tensor:
    """One image uint8 [H, W, 3] → float32 [3, size, size] in [-1, 1], black bars where needed."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32)
    height, width = pixels.shape[1:]
    if (height, width) != (size, size):
        ratio = max(height, width) / size
        new_height, new_width = max(1, int(height / ratio)), max(1, int(width / ratio))
        pixels = F.interpolate(
            pixels.unsqueeze(0), size=(new_height, new_width), mode="bilinear", align_corners=False
        )[0]
        pixels = pixels.round().clamp_(0, 255)
        top, left = (size - new_height) // 2, (size - new_width) // 2
        pixels = F.pad(
            pixels, (left, size - new_width - left, top, size - new_height - top), value=0.0
        )
    return pixels / 127.5 - 1.0


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


def require_state(observation: Mapping[str, Any], width: int) -> np.ndarray:
    """The robot's state as float32 [width].

    Raises:
        ObservationError: missing, misshaped or not finite.
    """
    if "state" not in observation:
        raise ObservationError(
            f"the observation needs 'state' [{width}]; it has {sorted(map(str, observation))}"
        )
    try:
        state = np.asarray(observation["state"], dtype=np.float32)
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
