"""Vision towers under the names of transformers up to 5.5 and of later ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.gr00t_n15.checkpoints import sizes as gr00t_sizes
from omega_qvla.policies.paligemma.names import TOWER

Rename = Callable[[int, str], str]


def renamed(directory: Path, rename: Rename) -> None:
    path = directory / "model.safetensors"
    save_file({rename(i, n): t for i, (n, t) in enumerate(load_file(path).items())}, path)


def flattened(tower: str) -> Rename:
    return lambda _, name: name.replace(f"{tower}.vision_model.", f"{tower}.")


def weights(
    directory: Path, choices: CheckpointOptions | None = None
) -> Mapping[str, torch.Tensor]:
    return load_policy(directory, choices).module.state_dict()


@pytest.mark.parametrize(
    ("layout", "tower"),
    [
        ("lerobot_directory", TOWER),
        ("openpi_directory", TOWER),
        ("groot_directory", gr00t_sizes.TOWER),
    ],
)
def test_later_names_are_read_as_the_earlier_ones(
    layout: str, tower: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write = request.getfixturevalue(layout)
    training = tmp_path / "training.json"
    choices = (
        CheckpointOptions(training_config=str(training)) if layout.startswith("openpi") else None
    )
    earlier, later = write("earlier"), write("later")
    renamed(later, flattened(tower))
    with safe_open(later / "model.safetensors", framework="pt") as file:
        assert not any(f"{tower}.vision_model." in name for name in file.keys())  # noqa: SIM118
    expected, found = weights(earlier, choices), weights(later, choices)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("layout", "tower"),
    [("lerobot_directory", TOWER), ("groot_directory", gr00t_sizes.TOWER)],
)
def test_a_tower_with_names_of_both_is_refused(
    layout: str, tower: str, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(layout)()
    later = flattened(tower)
    renamed(directory, lambda i, name: later(i, name) if "layers.0" in name else name)
    with pytest.raises(PolicyError, match="names its vision tower in two ways"):
        load_policy(directory)
