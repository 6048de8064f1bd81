"""Between the robot's units and the network's: images, state, prompts, actions.

Conventions follow openpi (``transforms.py``, ``tokenizer.py``):

* images are resized with padding to a square and mapped from [0, 255] to [-1, 1] (``images.py``);
* state and actions are normalized, by quantiles unless the checkpoint says otherwise
  (``normalization.py``);
* with ``state_in_prompt`` the normalized state becomes integers of 256 equal bins over [-1, 1]
  (values below the first bin give -1, as in the original) written into the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.processing.tokenizers import QwenTokenizer, SentencePieceTokenizer

STATE_BINS = 256
_WORD = re.compile(r"-?\d+|\w+|[^\w\s]")


class Encoded(NamedTuple):
    """One observation as a policy computes with it.

    Attributes:
        inputs: what the network reads, one row each.
        anchor: [state_dim] float32, what relative actions are counted from; None where actions are
            absolute.
    """

    inputs: Sequence[Tensor]
    anchor: np.ndarray | None


class Tokenizer(Protocol):
    """Text → token ids below ``size``, beginning-of-sequence included."""

    @property
    def size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def dump(self) -> dict[str, Any]: ...

    def files(self) -> dict[str, bytes]:
        """What ``dump`` refers to, by file name."""
        ...


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

    def files(self) -> dict[str, bytes]:
        return {}


class ByteTokenizer:
    """UTF-8 bytes plus an offset; for policies with random weights, which have no vocabulary."""

    size = 3 + 256

    def encode(self, text: str) -> list[int]:
        return [1, *(3 + byte for byte in text.encode("utf-8"))]

    def dump(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def files(self) -> dict[str, bytes]:
        return {}


def load_tokenizer(
    content: Mapping[str, Any], where: str, files: Mapping[str, bytes] | None = None
) -> Tokenizer:
    """A tokenizer from what its ``dump`` and its ``files`` wrote.

    Raises:
        PolicyError: unknown kind, or a file is missing or invalid.
        ResourceError: the library that the tokenizer needs is not installed.
    """
    match content:
        case {"kind": "words", "vocabulary": list(vocabulary)} if (
            all(isinstance(word, str) for word in vocabulary) and "<bos>" in vocabulary
        ):
            return WordTokenizer(vocabulary)
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": SentencePieceTokenizer.kind}:
            return SentencePieceTokenizer.from_files(files or {}, where)
        case {"kind": QwenTokenizer.kind}:
            return QwenTokenizer.from_files(files or {}, where)
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
