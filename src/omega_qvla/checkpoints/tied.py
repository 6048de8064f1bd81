"""Token embeddings that are tied to a language model's head: one tensor, or two that must be equal.

The embedding is read at inference, the head never.  Where the two are one tensor, files keep one of
its names, often the head's.  Files with both names can hold two different tensors (a merge or a
conversion that changed one of them), and then nothing in them says which one the policy was trained
with.  Where the original keeps the two apart, only the embedding is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.errors import PolicyError

TiedHalf = Literal["embedding", "head"]
"""Which of the two tensors is to be the embedding."""

_ROWS = 8192


class Tie(NamedTuple):
    """Official names of the two halves.

    Attributes:
        embedding, head: the names.
        apart: says that the original keeps the two apart, so that they may differ, and reads the
            embedding where both are stored in one type; None where the two are one tensor there.
    """

    embedding: str
    head: str
    apart: str | None = None


@dataclass(frozen=True)
class Difference:
    """How far the halves are apart: rows that differ, of all, and the largest difference."""

    rows: int
    of: int
    most: float

    def __str__(self) -> str:
        return f"{self.rows} of {self.of} rows differ, by up to {self.most:.3g}"


def untie(stored: StoredTensors, tie: Tie, told: TiedHalf | None) -> StoredTensors:
    """The tensors with the embedding under its own name.

    Args:
        stored: the checkpoint, under official names.
        tie: the names of the two halves.
        told: which half to take where they differ; None refuses such a checkpoint.

    Raises:
        PolicyError: the halves differ, although they are one tensor in the original, and nothing is
            told; or they cannot be read.
    """
    names = stored.headers
    if tie.head not in names:
        return stored
    if tie.embedding not in names:
        return stored.renamed(lambda name: tie.embedding if name == tie.head else name)
    difference = compare(stored, tie)
    if difference is None:
        return stored
    if told is None and tie.apart is not None and _of_one_type(stored, tie):
        return chosen(stored, tie, "embedding", f"{tie.apart}; {difference}")
    if told is None:
        raise PolicyError(
            f"{stored.where}: {tie.embedding} and {tie.head} stand for one tensor, but "
            f"{difference}. If you know which one the policy was trained with, give --tied "
            "embedding or --tied head, in Python CheckpointOptions(tied=...)"
        )
    return chosen(stored, tie, told, f"the {told}, as told; {difference}")


def chosen(stored: StoredTensors, tie: Tie, half: TiedHalf, why: str) -> StoredTensors:
    """The tensors with one of the halves as the embedding, and that decision noted."""
    decided = replace(stored, decisions={**stored.decisions, "token embedding": why})
    if half == "embedding":
        return decided
    headers = {name: header for name, header in stored.headers.items() if name != tie.embedding}
    places = {name: stored.places[name] for name in headers}
    alone = replace(decided, headers=headers, places=places)
    return alone.renamed(lambda name: tie.embedding if name == tie.head else name)


def compare(stored: StoredTensors, tie: Tie) -> Difference | None:
    """How the two halves differ, read in pieces; None where they are equal.

    Raises:
        PolicyError: their shapes differ, or they cannot be read.
    """
    first, second = (stored.headers[name].shape for name in tie[:2])
    if first != second or len(first) != 2:
        raise PolicyError(
            f"{stored.where}: {tie.embedding} has shape {list(first)} and {tie.head}, to which it "
            f"is tied, {list(second)}"
        )
    here, there = (stored.places[name] for name in tie[:2])
    if here == there:
        return None
    rows, most = 0, 0.0
    for start in range(0, first[0], _ROWS):
        rows_of = slice(start, start + _ROWS)
        one, other = (place.load(rows_of).to(torch.float32) for place in (here, there))
        apart = (one - other).abs().amax(dim=1) if first[1] else one.new_zeros(len(one))
        rows += int((~(apart == 0)).sum())
        most = max(most, float(apart.nan_to_num(torch.inf).max()))
    return Difference(rows, first[0], most) if rows else None


def _of_one_type(stored: StoredTensors, tie: Tie) -> bool:
    return stored.headers[tie.embedding].dtype == stored.headers[tie.head].dtype
