"""A token embedding and the head it is tied to: one tensor, or two that are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import GR00T_EMBEDDING, GR00T_HEAD
from safetensors.torch import load_file, save_file
from torch import Tensor

from omega_qvla.checkpoints import tied
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import read_file
from omega_qvla.checkpoints.tied import Difference, Tie, compare
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.paligemma.sizes import EMBEDDING, TIED_HEAD


def add_embedding(path: Path, prefix: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Give a file with the head alone an embedding too; returns it as float32."""
    tensors = load_file(path)
    tensors[prefix + EMBEDDING] = change(tensors[prefix + TIED_HEAD].clone())
    save_file(tensors, path)
    return tensors[prefix + EMBEDDING].float()


def moved(embedding: Tensor) -> Tensor:
    embedding[7, 3] += 1.0
    return embedding


def openpi(directory: Path, **choices: Any) -> Tensor:
    training = str(directory.parent / "training.json")
    policy = load_policy(directory, CheckpointOptions(training_config=training, **choices))
    return policy.module.get_parameter(EMBEDDING)


def test_equal_halves_are_one_tensor(openpi_directory: Callable[..., Path]) -> None:
    directory = openpi_directory()
    alone = openpi(directory)
    both = add_embedding(directory / "model.safetensors", "", lambda t: t.float())
    assert torch.equal(openpi(directory), alone) and torch.equal(alone, both)


def test_halves_that_differ_are_refused_until_one_is_named(
    openpi_directory: Callable[..., Path],
) -> None:
    directory = openpi_directory()
    head = openpi(directory)
    embedding = add_embedding(directory / "model.safetensors", "", moved)
    expected = (
        r"lm_head\.weight stand for one tensor, but 1 of \d+ rows differ, by up to 1\b.*--tied"
    )
    with pytest.raises(PolicyError, match=expected):
        openpi(directory)
    assert torch.equal(openpi(directory, tied="embedding"), embedding)
    assert torch.equal(openpi(directory, tied="head"), head)
    assert not torch.equal(head, embedding)


def test_the_half_that_was_named_is_recorded(openpi_directory: Callable[..., Path]) -> None:
    directory = openpi_directory()
    add_embedding(directory / "model.safetensors", "", moved)
    training = str(directory.parent / "training.json")
    policy = load_policy(directory, CheckpointOptions(training_config=training, tied="head"))
    assert policy.decisions["token embedding"].startswith("the head, as told; 1 of ")


def test_lerobot_keeps_the_halves_apart_and_reads_the_embedding(
    lerobot_directory: Callable[..., Path],
) -> None:
    """LeRobot from 0.5.0 on trains the embedding alone, so every fine-tune of it has two halves."""
    directory = lerobot_directory()
    head = load_policy(directory).module.get_parameter(EMBEDDING)
    embedding = add_embedding(directory / "model.safetensors", "model.", moved)
    policy = load_policy(directory)
    assert torch.equal(policy.module.get_parameter(EMBEDDING), embedding)
    assert policy.decisions["token embedding"].startswith("the embedding: LeRobot keeps it apart")
    told = load_policy(directory, CheckpointOptions(tied="head"))
    assert torch.equal(told.module.get_parameter(EMBEDDING), head)


def test_halves_of_two_types_are_refused_since_lerobot_reads_either(
    lerobot_directory: Callable[..., Path],
) -> None:
    """Its loader takes whichever comes later in the file, and that goes by type, then by name."""
    directory = lerobot_directory()
    add_embedding(directory / "model.safetensors", "model.", lambda t: moved(t.float()))
    with pytest.raises(PolicyError, match="--tied embedding or --tied head"):
        load_policy(directory)


def test_gr00t_holds_its_halves_to_each_other_too(gr00t_directory: Callable[..., Path]) -> None:
    directory = gr00t_directory()
    shard = next(p for p in directory.glob("*.safetensors") if GR00T_HEAD in load_file(p))
    tensors = load_file(shard)
    tensors[GR00T_EMBEDDING] = moved(tensors[GR00T_HEAD].clone())
    save_file(tensors, shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(
            f'"{GR00T_HEAD}"', f'"{GR00T_EMBEDDING}": "{shard.name}", "{GR00T_HEAD}"'
        )
    )
    with pytest.raises(PolicyError, match="stand for one tensor, but 1 of"):
        load_policy(directory, CheckpointOptions(data_config="libero"))
    load_policy(directory, CheckpointOptions(data_config="libero", tied="embedding"))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 13])
def test_the_difference_does_not_depend_on_the_pieces_it_is_read_in(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied, "_ROWS", 6)
    one = torch.randn((rows, 4), generator=torch.Generator().manual_seed(rows))
    other = one.clone()
    other[rows - 1, 2] += 2.0
    other[0, 0] -= 0.5
    path = tmp_path / "two.safetensors"
    save_file({"e": one, "h": other, "same": one.clone(), "wide": torch.zeros(rows, 5)}, path)
    stored = read_file(path)
    found = compare(stored, Tie("e", "h"))
    assert found == Difference(2 if rows > 1 else 1, rows, pytest.approx(2.0, abs=0.6))
    assert compare(stored, Tie("e", "same")) is None and compare(stored, Tie("e", "e")) is None
    with pytest.raises(PolicyError, match=r"e has shape \[\d+, 4\] and wide"):
        compare(stored, Tie("e", "wide"))


def test_a_half_that_is_not_finite_differs(tmp_path: Path) -> None:
    path = tmp_path / "two.safetensors"
    broken = torch.zeros(3, 2)
    broken[1, 1] = torch.nan
    save_file({"e": torch.zeros(3, 2), "h": broken}, path)
    assert compare(read_file(path), Tie("e", "h")) == Difference(1, 3, torch.inf)
