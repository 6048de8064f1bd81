"""Our pi0.5 module against outputs recorded from openpi's own PyTorch code.

How the golden file was made is in
``docs/design-notes/2026-11-parity.md``.  It holds three observations (a
masked last camera with a padded prompt, a masked middle camera with a full prompt, and all cameras
with a short prompt) and what openpi computed from them; the weights are drawn again here by
``golden_weights``.  openpi masks, in one padded batch; we drop, one observation at a time.

Tolerances.  Everything up to one velocity agrees to 2e-6 where it was recorded (values are about
5 at most); 2e-5 leaves a decade for another platform's summation order.  Action chunks may differ
by 1e-4: openpi finds its flow times by subtracting 1/steps over and over in float32, we use
1 - i/steps, and the fastest time feature turns 2π/0.004 radians per unit of time, so that rounding
alone moved actions by up to 3.9e-5 (10 steps).  At openpi's own times the chunks agree to 1e-6,
which the last test holds to 2e-5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.layers.attention import KeyValue
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.network import Pi05Module, sample_chunk

GOLDEN = Path(__file__).parent / "golden" / "pi05_shrunken.safetensors"
OBSERVATIONS = (0, 1, 2)
STEPS = (1, 4, 7, 10)
FORWARD_TOLERANCE = 2e-5
CHUNK_TOLERANCE = 1e-4


def golden_weights(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """The weights of the golden run, key by key in sorted order from one seeded generator.

    Each tensor is u·s with u uniform of unit variance, (2·rand - 1)·√3.  Tensors of rank two or
    more: s = 1/√fan_in, fan_in being the product of all dimensions but the first.  Others
    (biases, norm gains): s = 0.3, plus one for the gains of the vision tower's layer norms.
    Uniform, not normal, because uniform draws are exact: the same bits on every platform.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for key in sorted(shapes):
        shape = shapes[key]
        unit = (2.0 * torch.rand(shape, generator=generator) - 1.0) * math.sqrt(3.0)
        if len(shape) > 1:
            weights[key] = unit * (1.0 / math.sqrt(math.prod(shape[1:])))
        else:
            gain = "vision_tower" in key and key.endswith(".weight")
            weights[key] = unit * 0.3 + (1.0 if gain else 0.0)
    return weights


@dataclass(frozen=True)
class Golden:
    """The recorded tensors, their metadata, and our module with the same weights."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    module: Pi05Module

    def pixels(self) -> Tensor:
        """[observations, cameras, 3, S, S] in [-1, 1]."""
        return self.tensors["images"].float() / 127.5 - 1.0

    def prefix(self, observation: int) -> Tensor:
        """Our prefix [1, P, D]: masked cameras and prompt padding dropped."""
        cameras = self.tensors["camera_mask"][observation]
        real = self.tensors["prompt_mask"][observation]
        pixels = self.pixels()[observation, cameras].unsqueeze(0)
        token_ids = self.tensors["prompt"][observation, real].long().unsqueeze(0)
        return self.module.embed_prefix(pixels, token_ids)

    def cache(self, observation: int) -> tuple[list[KeyValue], int]:
        """Our keys and values of one observation, and the prefix length."""
        prefix = self.prefix(observation)
        length = prefix.shape[1]
        return self.module.prefill(prefix, torch.arange(length).unsqueeze(0))[0], length

    def real_prefix(self, observation: int) -> Tensor:
        """[padded P] bool: the positions of openpi's padded prefix that we keep."""
        cameras = self.tensors["camera_mask"][observation]
        images = cameras.repeat_interleave(self.module.config.tokens_per_image)
        return torch.cat((images, self.tensors["prompt_mask"][observation]))

    def noise(self, observation: int) -> Tensor:
        return self.tensors["noise"][observation : observation + 1]


@pytest.fixture(scope="module")
def golden() -> Iterator[Golden]:
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = dict(file.metadata())
    module = Pi05Module(Pi05Config.model_validate_json(metadata["config"])).eval()
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    module.load_state_dict(golden_weights(shapes, int(metadata["weights_seed"])))
    with torch.no_grad():
        yield Golden(load_file(GOLDEN), metadata, module)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def accumulated_times(steps: int) -> list[float]:
    """Openpi's flow times: 1, then 1/steps subtracted again and again in float32."""
    time, times = torch.tensor(1.0), []
    for _ in range(steps):
        times.append(time.item())
        time = time - 1.0 / steps
    return times


def test_weights_are_regenerated_bit_for_bit(golden: Golden) -> None:
    digest = hashlib.sha256()
    state = golden.module.state_dict()
    for key in sorted(state):
        digest.update(state[key].numpy().tobytes())
    assert digest.hexdigest() == golden.metadata["weights_sha256"]


def test_golden_file_covers_a_masked_camera_and_a_padded_prompt(golden: Golden) -> None:
    cameras, prompt = golden.tensors["camera_mask"], golden.tensors["prompt_mask"]
    assert cameras.tolist() == [[True, True, False], [True, False, True], [True, True, True]]
    assert prompt.sum(-1).tolist() == [7, 12, 4]
    assert GOLDEN.stat().st_size <= 300_000


def test_siglip_features_match(golden: Golden) -> None:
    ours = golden.module.vision_model(golden.pixels()[0])
    assert largest_difference(ours, golden.tensors["siglip"]) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_prefix_keys_and_values_match_in_every_layer(golden: Golden, observation: int) -> None:
    cache, _ = golden.cache(observation)
    real = golden.real_prefix(observation)
    for i, (key, value) in enumerate(cache):
        their_key = golden.tensors[f"cache.{i}.key"][observation : observation + 1, :, real]
        their_value = golden.tensors[f"cache.{i}.value"][observation : observation + 1, :, real]
        assert largest_difference(key, their_key) <= FORWARD_TOLERANCE
        assert largest_difference(value, their_value) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_velocity_matches(golden: Golden, observation: int) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(
        torch.tensor([float(golden.metadata["velocity_time"])])
    )
    rotary = golden.module.suffix_rotary(length)
    ours = golden.module.velocity(golden.noise(observation), modulation, cache, rotary)
    theirs = golden.tensors["velocity"][observation : observation + 1]
    assert largest_difference(ours, theirs) <= FORWARD_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_action_chunk_matches(golden: Golden, observation: int, steps: int) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(torch.tensor(euler_times(steps)))
    noise = golden.noise(observation)
    ours = sample_chunk(golden.module, cache, length, noise, modulation, FlowClock())
    theirs = golden.tensors[f"actions.{steps}"][observation : observation + 1]
    assert largest_difference(ours, theirs) <= CHUNK_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_action_chunk_matches_closely_at_openpi_s_rounded_times(
    golden: Golden, observation: int, steps: int
) -> None:
    cache, length = golden.cache(observation)
    modulation = golden.module.step_modulation(torch.tensor(accumulated_times(steps)))
    noise = golden.noise(observation)
    ours = sample_chunk(golden.module, cache, length, noise, modulation, FlowClock())
    theirs = golden.tensors[f"actions.{steps}"][observation : observation + 1]
    assert largest_difference(ours, theirs) <= FORWARD_TOLERANCE
