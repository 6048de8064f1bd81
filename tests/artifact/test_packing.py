"""The 4-bit codec against a definition written word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omega_qvla.artifact.packing import pack_int4, packed_width, unpack_int4
from omega_qvla.errors import ArtifactError


def _words(row: list[int]) -> list[int]:
    """Definition: value + 8 in bits 4j of the word, signed 32-bit, missing nibbles 0."""
    words: list[int] = []
    for start in range(0, len(row), 8):
        word = sum((v + 8) << 4 * j for j, v in enumerate(row[start : start + 8]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 5), st.integers(0, 35), st.integers(0, 2**31))
def test_packing_follows_the_definition_and_returns(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=generator)
    packed = pack_int4(integers)
    assert packed.dtype == torch.int32 and packed.shape == (rows, packed_width(columns))
    assert packed.tolist() == [_words(row) for row in integers.tolist()]
    assert torch.equal(unpack_int4(packed, integers.shape), integers)


def test_known_words() -> None:
    row = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7, 7]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack_int4(row)[0].tolist()] == [0xFEA98710, 0x0000000F]


def test_views_and_transposed_inputs_pack_like_copies() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(4).reshape(8, 8)
    assert torch.equal(pack_int4(integers.T), pack_int4(integers.T.contiguous()))
    strided = pack_int4(integers).repeat(1, 2)[:, ::2]
    assert torch.equal(unpack_int4(strided, (8, 8)), integers)
    assert torch.equal(unpack_int4(strided[:1], (1, 8)), integers[:1])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.int8),
        torch.full((1, 1), 8, dtype=torch.int8),
        torch.full((1, 1), -9, dtype=torch.int8),
    ],
)
def test_unpackable_values_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ArtifactError, match="4-bit packing expects"):
        pack_int4(bad)


def test_words_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"expected torch\.int32 \[2, 2\]"):
        unpack_int4(torch.zeros(2, 3, dtype=torch.int32), (2, 9))
    with pytest.raises(ArtifactError, match=r"expected torch\.int32"):
        unpack_int4(torch.zeros(2, 2, dtype=torch.int64), (2, 9))
