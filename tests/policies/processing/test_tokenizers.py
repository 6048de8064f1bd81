"""Tokenizers from their own files: Qwen's real vocabulary, chat, padding, damaged files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from omega_qvla.errors import PolicyError, ResourceError
from omega_qvla.policies.gr00t_n15.config import CHAT_PROMPT
from omega_qvla.policies.processing.published_tokenizers import (
    QWEN_FILES,
    QwenTokenizer,
    SentencePieceTokenizer,
)
from omega_qvla.policies.processing.tokenizers import load_tokenizer

pytest.importorskip("tokenizers", reason="the extra hub is not installed")

REAL = Path(__file__).parents[4] / "shared" / "data" / "qwen_tokenizer"


@pytest.fixture(scope="module")
def real() -> QwenTokenizer:
    if not REAL.is_dir():
        pytest.skip(f"GR00T's tokenizer is not at {REAL}")
    return QwenTokenizer({name: (REAL / name).read_bytes() for name in QWEN_FILES}, str(REAL))


def small_files() -> dict[str, bytes]:
    """Every byte, one merge, two added tokens."""
    alphabet = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(256 - len(alphabet))]
    vocab = {letter: i for i, letter in enumerate([*alphabet, "ab"])}
    added = {"<|im_end|>": len(vocab), "<IMG_CONTEXT>": len(vocab) + 1}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\na b\n",
        "added_tokens.json": json.dumps(added).encode(),
    }


def test_the_published_vocabulary_has_the_known_numbers(real: QwenTokenizer) -> None:
    """Sizes and special tokens as ``tokenizer_config.json`` lists them."""
    assert real.size == 151680
    config = json.loads((REAL / "tokenizer_config.json").read_text())
    for number, entry in config["added_tokens_decoder"].items():
        assert real.token_id(entry["content"]) == int(number)
        assert real.encode(entry["content"]) == [int(number)]


def test_the_chat_holds_a_run_of_places_for_every_image(real: QwenTokenizer) -> None:
    places_of_one = "<IMG_CONTEXT>" * 256
    ids = real.encode(places_of_one.join(CHAT_PROMPT.pieces("open the drawer", 2)))
    places = [i for i, token in enumerate(ids) if token == real.token_id("<IMG_CONTEXT>")]
    assert len(places) == 512
    assert places[255] - places[0] == 255 and places[511] - places[256] == 255
    start, end = real.token_id("<img>"), real.token_id("</img>")
    assert (ids[places[0] - 1], ids[places[255] + 1]) == (start, end)
    assert ids[:2] == [real.token_id("<|im_start|>"), *real.encode("system")]
    assert ids[-3:] == [
        real.token_id("<|im_start|>"),
        *real.encode("assistant"),
        *real.encode("\n"),
    ]


def test_byte_pairs_are_merged_and_added_tokens_kept_whole() -> None:
    tokenizer = QwenTokenizer(small_files(), "small")
    ids = json.loads(small_files()["vocab.json"])
    assert tokenizer.encode("ab<|im_end|>ba") == [ids["ab"], 257, ids["b"], ids["a"]]
    assert tokenizer.size == 259


def test_a_tokenizer_survives_its_own_description() -> None:
    tokenizer = QwenTokenizer(small_files(), "small")
    again = load_tokenizer(tokenizer.dump(), "t.json", tokenizer.files())
    text = "pick up the Bowl, 12\n\n  then é ab"
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("vocab.json", None, r"refers to vocab\.json, which is missing"),
        ("vocab.json", b"{", "vocab.json is not valid JSON"),
        ("vocab.json", b'{"a": "b"}', "must map tokens to their numbers"),
        ("vocab.json", b'{"a": -1}', "must map tokens to their numbers"),
        ("merges.txt", b"a b c\n", "two tokens a line"),
        ("merges.txt", b"\xff\xfe", "is not text"),
        ("merges.txt", b"nowhere b\n", "do not fit"),
        ("added_tokens.json", b'{"<x>": 7000}', "after vocab.json it would be 257"),
    ],
)
def test_damaged_vocabulary_files_are_refused(
    name: str, content: bytes | None, expected: str
) -> None:
    files = {**small_files(), name: content}
    with pytest.raises(PolicyError, match=expected):
        QwenTokenizer({k: v for k, v in files.items() if v is not None}, "small")


def test_without_the_libraries_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("tokenizers", "sentencepiece"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ResourceError, match=r"package tokenizers, .*pip install .*'hub'"):
        QwenTokenizer(small_files(), "small")
    with pytest.raises(ResourceError, match=r"package sentencepiece, .*pip install"):
        SentencePieceTokenizer(b"", "small")
