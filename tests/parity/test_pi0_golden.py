"""Our pi0 module against outputs recorded from openpi's own PyTorch code.

How the golden file was made is written in ``docs/parity.md``; tolerances are explained in
``tests/helpers/openpi_golden.py``.  openpi computes the state's token in every step, behind a mask;
ours is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
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
from torch import Tensor

from omega_qvla.flow_time import euler_times
from omega_qvla.policies.layers.attention import KeyValue
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi0.network import Pi0Module

GOLDEN = Path(__file__).parent / "golden" / "pi0_shrunken.safetensors"


@pytest.fixture(scope="module")
def golden() -> Golden[Pi0Module]:
    return load_golden(GOLDEN, Pi0Config, Pi0Module)


def seen(golden: Golden[Pi0Module], observation: int) -> tuple[list[KeyValue], int]:
    """Our keys and values of prefix and state, and how many tokens these are."""
    cache, length = golden.cache(observation)
    return golden.module.with_state(cache, golden.of("state", observation), length), length + 1


def sampled(golden: Golden[Pi0Module], observation: int, times: list[float]) -> Tensor:
    """Our chunk with Euler steps at these flow times."""
    module, x = golden.module, golden.of("noise", observation)
    cache, length = seen(golden, observation)
    codes, rotary = module.time_code(torch.tensor(times)), module.suffix_rotary(length)
    for code in codes.split(1):
        x = x - module.velocity(x, code, cache, rotary) / len(times)
    return x


def test_weights_are_regenerated_bit_for_bit(golden: Golden[Pi0Module]) -> None:
    assert weights_digest(golden.module) == golden.metadata["weights_sha256"]


def test_golden_file_covers_a_masked_camera_and_a_padded_prompt(
    golden: Golden[Pi0Module],
) -> None:
    cameras, prompt = golden.tensors["camera_mask"], golden.tensors["prompt_mask"]
    assert cameras.tolist() == [[True, True, False], [True, False, True], [True, True, True]]
    assert prompt.sum(-1).tolist() == [7, 12, 4]
    assert GOLDEN.stat().st_size <= 100_000


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_velocity_matches(golden: Golden[Pi0Module], observation: int) -> None:
    module = golden.module
    cache, length = seen(golden, observation)
    code = module.time_code(torch.tensor([float(golden.metadata["velocity_time"])]))
    noise = golden.of("noise", observation)
    ours = module.velocity(noise, code, cache, module.suffix_rotary(length))
    assert largest_difference(ours, golden.of("velocity", observation)) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize(
    ("times", "tolerance"),
    [(euler_times, CHUNK_TOLERANCE), (accumulated_times, FORWARD_TOLERANCE)],
    ids=["exact-times", "openpi's-times"],
)
def test_action_chunk_matches(
    golden: Golden[Pi0Module],
    observation: int,
    steps: int,
    times: Callable[[int], list[float]],
    tolerance: float,
) -> None:
    ours = sampled(golden, observation, times(steps))
    assert largest_difference(ours, golden.of(f"actions.{steps}", observation)) <= tolerance
