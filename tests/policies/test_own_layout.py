"""This project's own layout: what was written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import WEIGHTS
from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.own_layout import write_own


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_own(load_policy("random:tiny-gr00t"), tmp_path / "policy")
    return tmp_path / "policy"


def test_a_policy_written_and_read_acts_as_before(written: Path) -> None:
    before, after = load_policy("random:tiny-gr00t"), load_policy(written)
    seen = {
        "images": {c: np.full((84, 84, 3), 90, np.uint8) for c in ("base", "wrist")},
        "state": np.linspace(-1.0, 1.0, 4, dtype=np.float32),
        "prompt": "open the door",
    }
    noise = torch.randn(before.noise_shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (policy.sample_actions(seen, noise=noise) for policy in (before, after))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["statistics.json", "tokenizer.json", WEIGHTS])
def test_a_missing_file_is_named(written: Path, name: str) -> None:
    (written / name).unlink()
    with pytest.raises(PolicyError, match=name):
        load_policy(written)


def test_a_missing_tensor_is_named(written: Path) -> None:
    tensors = load_file(written / WEIGHTS)
    del tensors["action_head.vlln.weight"]
    save_file(tensors, written / WEIGHTS)
    with pytest.raises(PolicyError, match=r"missing action_head\.vlln\.weight"):
        load_policy(written)


def test_a_configuration_that_is_not_one_is_refused(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps({**config, "horizon": "ten"}))
    with pytest.raises(PolicyError, match="horizon"):
        load_policy(written)


def test_an_embodiment_it_does_not_have_is_refused(written: Path) -> None:
    with pytest.raises(PolicyError, match=r"embodiment.*5"):
        load_policy(written, CheckpointOptions(embodiment="5"))
