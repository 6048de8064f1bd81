"""The tokenizers of published policies, rebuilt from their own vocabulary files.

* pi0.5 reads PaliGemma's sentencepiece model, ``tokenizer.model`` (openpi downloads it as
  ``paligemma_tokenizer.model``); the beginning-of-sequence token comes first.
* GR00T N1.5 reads Qwen's byte-level byte pairs, ``vocab.json``, ``merges.txt`` and
  ``added_tokens.json``.

The originals pad prompts to one length, pi0.5 on the right and GR00T on the left, and mask the
padding.  Here an observation is one prompt of its own length, which gives the same.

Neither openpi nor LeRobot puts PaliGemma's into a checkpoint: ``paligemma_tokenizer`` finds it.
An artifact keeps these files, so that it never needs the checkpoint again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omega_qvla.checkpoints.files import MAX_TEXT_BYTES, parse_json, read_bytes
from omega_qvla.checkpoints.hub import cached_file
from omega_qvla.errors import PolicyError
from omega_qvla.extras import needing

SENTENCEPIECE_FILE = "tokenizer.model"
PALIGEMMA = "google/paligemma-3b-pt-224"
PALIGEMMA_FILES = (SENTENCEPIECE_FILE, "paligemma_tokenizer.model")
QWEN_FILES: tuple[str, ...] = ("vocab.json", "merges.txt", "added_tokens.json")

# Qwen2's own splitting rule: contractions, words, single digits, punctuation, line breaks, spaces.
_QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SentencePieceTokenizer:
    """A sentencepiece model with a beginning-of-sequence token.

    Args:
        model: the bytes of ``tokenizer.model``.
        where: names it in errors.

    Raises:
        PolicyError: not a sentencepiece model, or without a beginning-of-sequence token.
        ResourceError: sentencepiece is not installed.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"

    def __init__(self, model: bytes, where: str) -> None:
        with needing(where, "hub"):
            from sentencepiece import SentencePieceProcessor
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            if not model or self._processor.vocab_size() == 0:
                raise RuntimeError("it is empty")
        except (RuntimeError, ValueError, TypeError) as error:
            raise PolicyError(f"{where} is not a sentencepiece model: {error}") from error
        if self._processor.bos_id() < 0:
            raise PolicyError(f"{where} has no beginning-of-sequence token: not PaliGemma's")
        self._model = model

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str) -> SentencePieceTokenizer:
        """The tokenizer whose ``files`` these are.

        Raises:
            PolicyError, ResourceError: the file is missing, or as the constructor.
        """
        return cls(_required(files, SENTENCEPIECE_FILE, where), SENTENCEPIECE_FILE)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, beginning-of-sequence first."""
        return [self._processor.bos_id(), *self._processor.encode(text)]

    def dump(self) -> dict[str, Any]:
        """The kind; the vocabulary is in ``files``."""
        return {"kind": self.kind}

    def files(self) -> dict[str, bytes]:
        """The model's bytes."""
        return {SENTENCEPIECE_FILE: self._model}


class QwenTokenizer:
    """Qwen's byte-level byte pairs with added tokens.

    Args:
        files: contents of ``vocab.json``, ``merges.txt`` and ``added_tokens.json``.
        where: names them in errors.

    Raises:
        PolicyError: a file is missing or invalid.
        ResourceError: tokenizers is not installed.
    """

    kind: Literal["qwen"] = "qwen"

    def __init__(self, files: Mapping[str, bytes], where: str) -> None:
        with needing(where, "hub"):
            import tokenizers
        vocab, merges, added = (_required(files, name, where) for name in QWEN_FILES)
        self._files = dict(zip(QWEN_FILES, (vocab, merges, added), strict=True))
        ids = _token_ids(vocab, f"{where}: vocab.json")
        pairs = _pairs(merges, where)
        try:
            model = tokenizers.models.BPE(vocab=ids, merges=pairs)
        except Exception as error:  # the library raises nothing more specific
            raise PolicyError(f"{where}: vocab.json and merges.txt do not fit: {error}") from error
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.normalizer = tokenizers.normalizers.NFC()
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN_PIECES), "isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        wanted = _token_ids(added, f"{where}: added_tokens.json")
        self._tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(text, normalized=False, special=True)
                for text in sorted(wanted, key=lambda text: wanted[text])
            ]
        )
        for text, number in wanted.items():
            found = self._tokenizer.token_to_id(text)
            if found != number:
                raise PolicyError(
                    f"{where}: added_tokens.json gives {text!r} the number {number}, after "
                    f"vocab.json it would be {found}: the files are not of one tokenizer"
                )

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], where: str) -> QwenTokenizer:
        """The tokenizer whose ``files`` these are."""
        return cls(files, where)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def token_id(self, text: str) -> int:
        """The number of one token.

        Raises:
            PolicyError: there is no such token.
        """
        number = self._tokenizer.token_to_id(text)
        if number is None:
            raise PolicyError(f"this tokenizer has no token {text!r}")
        return number

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is put in front."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def dump(self) -> dict[str, Any]:
        """The kind; the vocabulary is in ``files``."""
        return {"kind": self.kind}

    def files(self) -> dict[str, bytes]:
        """Vocabulary, merges and added tokens."""
        return dict(self._files)


def _token_ids(content: bytes, where: str) -> dict[str, int]:
    ids = parse_json(content, where)
    numbers = ids.values()
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in numbers):
        raise PolicyError(f"{where} must map tokens to their numbers")
    return ids


def _pairs(content: bytes, where: str) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{where}: merges.txt is not text: {error}") from error
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = [line.split(" ") for line in lines if line]
    if not all(len(pair) == 2 for pair in pairs):
        raise PolicyError(f"{where}: merges.txt must have two tokens a line")
    return [(first, second) for first, second in pairs]


def _required(files: Mapping[str, bytes], name: str, where: str) -> bytes:
    if name not in files:
        raise PolicyError(f"{where} refers to {name}, which is missing")
    return files[name]


def paligemma_tokenizer(directory: Path, given: Path | None) -> SentencePieceTokenizer:
    """The tokenizer that was given, or is in the directory, or in the hub's cache on this machine.

    Raises:
        PolicyError: it is in none of them (the message says how to get it), or is invalid.
        ResourceError: sentencepiece is not installed.
    """
    if given is not None:
        return _read(given)
    for name in PALIGEMMA_FILES:
        if (directory / name).exists():
            return SentencePieceTokenizer(read_bytes(directory, name), str(directory / name))
    cached = cached_file(PALIGEMMA, SENTENCEPIECE_FILE)
    if cached is not None:
        return _read(cached)
    raise PolicyError(
        f"{directory} has no {SENTENCEPIECE_FILE}, PaliGemma's tokenizer. Get it with\n"
        "curl -o tokenizer.model https://storage.googleapis.com/big_vision/paligemma_tokenizer.model"
        f"\nor from {PALIGEMMA} on the hub (its licence has to be accepted there), and put it into "
        "that directory"
    )


def _read(path: Path) -> SentencePieceTokenizer:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise PolicyError(f"{path} is too large to be {SENTENCEPIECE_FILE}")
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise PolicyError(f"cannot read the tokenizer {path}: {error}") from error
