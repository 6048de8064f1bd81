"""Finding PaliGemma's tokenizer, which neither openpi nor LeRobot puts into a checkpoint."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.files import MAX_TEXT_BYTES, read_bytes
from omega_qvla.checkpoints.hub import cached_file
from omega_qvla.errors import PolicyError
from omega_qvla.policies.processing.tokenizers import SENTENCEPIECE_FILE, SentencePieceTokenizer

PALIGEMMA = "google/paligemma-3b-pt-224"
NAMES = (SENTENCEPIECE_FILE, "paligemma_tokenizer.model")


def paligemma_tokenizer(directory: Path, given: Path | None) -> SentencePieceTokenizer:
    """The tokenizer that was given, or is in the directory, or in the hub's cache on this machine.

    Raises:
        PolicyError: it is in none of them (the message says how to get it), or is invalid.
        ResourceError: sentencepiece is not installed.
    """
    if given is not None:
        return _read(given)
    for name in NAMES:
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
