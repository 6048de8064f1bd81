"""The text that a language model is calibrated and measured on, as chunks of token ids.

English technical prose and code: parts of Python's own reference documentation, shipped with their
licence (``assets/python_reference``), so that every machine measures on the same characters.
Calibration, selection and test are of different topics.  Recipes are chosen on ``selection``;
``test`` is what tables report.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

import torch

from omega_qvla.checkpoints.gguf_file import GgufFile, setting
from omega_qvla.errors import PolicyError
from omega_qvla.extras import needing
from omega_qvla.policies.base import Observation

Split = Literal["calibration", "selection", "test"]

CHUNK = 256
"""Tokens of a chunk."""
COUNTS = {"calibration": 32, "selection": 24, "test": 24}
"""Chunks of each part of the text."""


def chunks(found: GgufFile, split: Split) -> list[Observation]:
    """Consecutive chunks of one part of the text, each ``{"tokens": int64 [CHUNK]}``.

    Raises:
        PolicyError: the model has another kind of tokenizer, or its tokens are so long that the
            text has too few of them.
    """
    text = files("omega_qvla").joinpath(f"assets/python_reference/{split}.txt").read_text("utf-8")
    ids = token_ids(found, text)
    wanted = COUNTS[split] * CHUNK
    if len(ids) < wanted:
        raise PolicyError(f"{split} has {len(ids)} tokens of this model, {wanted} are needed")
    return [{"tokens": part} for part in torch.tensor(ids[:wanted]).split(CHUNK)]


def token_ids(found: GgufFile, text: str) -> list[int]:
    """A text in the tokens of a model: byte pairs as GPT-2's, every digit by itself.

    Raises:
        PolicyError: the file's tokenizer is another one.
        MissingPackageError: ``tokenizers`` is not installed.
    """
    kind = found.settings.get("tokenizer.ggml.model"), found.settings.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise PolicyError(f"the GGUF file has a tokenizer of kind {kind}, not SmolLM's")
    with needing("reading text for a language model", "bench"):
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    words = setting(found, "tokenizer.ggml.tokens", list)
    merges = [tuple(pair.split(" ")) for pair in setting(found, "tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    splitting = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.pre_tokenizer = Sequence(splitting)
    return tokenizer.encode(text, add_special_tokens=False).ids
