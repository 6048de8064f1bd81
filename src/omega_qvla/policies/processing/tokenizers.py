"""Text → token ids: closed vocabularies, bytes, and what a tokenizer is saved as."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.processing.prompts import STATE_BINS
from omega_qvla.policies.processing.published_tokenizers import (
    QwenTokenizer,
    SentencePieceTokenizer,
)

_WORD = re.compile(r"-?\d+|\w+|[^\w\s]")


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
        case _:
            raise PolicyError(f"{where} does not describe a known tokenizer")
