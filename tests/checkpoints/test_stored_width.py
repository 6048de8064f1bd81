"""What stays unquantized keeps the width that its checkpoint gave it, and is predicted so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.evaluation.footprints import directory_bytes
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy
from omega_qvla.runtime.memory import narrowed
from omega_qvla.runtime.prediction import predict_directory

VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.encoder.layers.0"


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_an_unquantized_part_is_as_wide_as_in_its_checkpoint(
    stored: torch.dtype, kept: torch.dtype, openpi_directory: Callable[..., Path], tmp_path: Path
) -> None:
    """The paper's scope leaves the vision tower; the values here need every bit of their type."""
    directory = openpi_directory()
    source = torch.Generator().manual_seed(5)
    tensors = load_file(directory / "model.safetensors")
    drawn = {
        name: torch.empty(tensor.shape).normal_(0.0, 0.1, generator=source).to(stored)
        for name, tensor in tensors.items()
    }
    save_file(drawn, directory / "model.safetensors")
    choices = CheckpointOptions(training_config=str(tmp_path / "training.json"))
    recipe = Recipe.load("rtn").scoped("paper")
    policy = stream_policy(directory, choices)
    planned = predict_directory(policy, recipe)["total_bytes"]
    observations = Observations.random(policy.config.cameras, policy.config.state_dim, count=1)
    made = oq.quantize(policy, observations, recipe)
    assert isinstance(made, QuantizedPolicy)
    assert made.tensors()[f"{VISION}.mlp.fc1.weight"].dtype == kept
    saved = made.save_pretrained(tmp_path / "out")
    assert planned == pytest.approx(directory_bytes(saved), rel=0.01)
    loaded = oq.load(saved).policy.module.get_parameter(f"{VISION}.mlp.fc1.weight")
    assert torch.equal(loaded, drawn[f"{VISION}.mlp.fc1.weight"].float())


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_narrowing_loses_nothing(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values).to(dtype).to(torch.float32)
    narrow = narrowed(tensor)
    assert torch.equal(narrow.to(torch.float32), tensor)
    finite = bool(torch.isfinite(tensor).all())
    assert not finite or narrow.dtype.itemsize <= dtype.itemsize
