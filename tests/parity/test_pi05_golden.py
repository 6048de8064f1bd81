"""Our pi0.5 module against outputs recorded from openpi's own PyTorch code.

How the golden file was made is written in ``docs/design-notes/2026-11-parity.md``; tolerances are
explained in ``tests/helpers/openpi_golden.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from openpi_golden import (
    CHUNK_TOLERANCE,
    FORWARD_TOLERANCE,
    OBSERVATIONS,
    STEPS,
    Golden,
    accumulated_times,
    largest_difference,
    load_golden,
    weights_digest,
)

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module, sample_chunk

GOLDEN = Path(__file__).parent / "golden" / "pi05_shrunken.safetensors"


@pytest.fixture(scope="module")
def golden() -> Golden[Pi05Module]:
    return load_golden(GOLDEN, Pi05Config, Pi05Module)


def test_weights_are_regenerated_bit_for_bit(golden: Golden[Pi05Module]) -> None:
    assert weights_digest(golden.module) == golden.metadata["weights_sha256"]


def test_golden_file_covers_a_masked_camera_and_a_padded_prompt(golden: Golden[Pi05Module]) -> None:
    cameras, prompt = golden.tensors["camera_mask"], golden.tensors["prompt_mask"]
    assert cameras.tolist() == [[True, True, False], [True, False, True], [True, True, True]]
    assert prompt.sum(-1).tolist() == [7, 12, 4]
    assert GOLDEN.stat().st_size <= 300_000


def test_siglip_features_match(golden: Golden[Pi05Module]) -> None:
    ours = golden.module.vision_model(golden.pixels()[0])
    assert largest_difference(ours, golden.tensors["siglip"]) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_prefix_keys_and_values_match_in_every_layer(
    golden: Golden[Pi05Module], observation: int
) -> None:
    cache, _ = golden.cache(observation)
    real = golden.real_prefix(observation)
    for i, (key, value) in enumerate(cache):
        their_key = golden.tensors[f"cache.{i}.key"][observation : observation + 1, :, real]
        their_value = golden.tensors[f"cache.{i}.value"][observation : observation + 1, :, real]
        assert largest_difference(key, their_key) <= FORWARD_TOLERANCE
        assert largest_difference(value, their_value) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_velocity_matches(golden: Golden[Pi05Module], observation: int) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(
        torch.tensor([float(golden.metadata["velocity_time"])])
    )
    rotary = golden.module.suffix_rotary(length)
    ours = golden.module.velocity(golden.of("noise", observation), modulation, cache, rotary)
    theirs = golden.of("velocity", observation)
    assert largest_difference(ours, theirs) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_action_chunk_matches(golden: Golden[Pi05Module], observation: int, steps: int) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(torch.tensor(euler_times(steps)))
    noise = golden.of("noise", observation)
    ours = sample_chunk(golden.module, cache, length, noise, modulation, FlowClock())
    theirs = golden.of(f"actions.{steps}", observation)
    assert largest_difference(ours, theirs) <= CHUNK_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_action_chunk_matches_closely_at_openpi_s_rounded_times(
    golden: Golden[Pi05Module], observation: int, steps: int
) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(torch.tensor(accumulated_times(steps)))
    noise = golden.of("noise", observation)
    ours = sample_chunk(golden.module, cache, length, noise, modulation, FlowClock())
    theirs = golden.of(f"actions.{steps}", observation)
    assert largest_difference(ours, theirs) <= FORWARD_TOLERANCE
