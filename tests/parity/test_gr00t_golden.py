"""Our GR00T N1.5 module against outputs recorded from LeRobot 0.4.4's code.

How the golden file was made is in
``docs/design-notes/2026-11-parity.md``.  It holds three observations with
two cameras and prompts of different lengths, images between the words, and what LeRobot computed
from them one at a time; the weights are drawn again here by ``golden_weights``.

Tolerance.  Everything agreed to 3e-6 where it was recorded (values are about 8 at most); 2e-5
leaves almost a decade for another platform's summation order.  Chunks need no more: the network
sees whole buckets of the flow time, which both sides find exactly.
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
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.network import Gr00tN15Module, Observed, sample_chunk

GOLDEN = Path(__file__).parent / "golden" / "gr00t_shrunken.safetensors"
OBSERVATIONS = (0, 1, 2)
STEPS = (1, 4, 7, 8)
TOLERANCE = 2e-5


def golden_weights(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """The weights of the golden run, key by key in sorted order from one seeded generator.

    Each tensor is u·s with u uniform of unit variance, (2·rand - 1)·√3.  Matrices: s = 1/√fan_in,
    where an embodiment's W has its inputs in the middle dimension.  Others (biases, norm gains):
    s = 0.3, plus one for gains.  Uniform draws are exact: the same bits on every platform.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for key in sorted(shapes):
        shape = shapes[key]
        unit = (2.0 * torch.rand(shape, generator=generator) - 1.0) * math.sqrt(3.0)
        if key.endswith(".W"):
            weights[key] = unit * (1.0 / math.sqrt(shape[1]))
        elif len(shape) > 1 and not key.endswith(".b"):
            weights[key] = unit * (1.0 / math.sqrt(math.prod(shape[1:])))
        else:
            weights[key] = unit * 0.3 + (1.0 if key.endswith(".weight") else 0.0)
    return weights


@dataclass(frozen=True)
class Golden:
    """The recorded tensors, their metadata, and our module with the same weights."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    module: Gr00tN15Module

    def pixels(self, observation: int) -> Tensor:
        """[1, cameras, 3, S, S] in [-1, 1]."""
        return self.tensors["images"][observation : observation + 1].float() / 127.5 - 1.0

    def row(self, name: str, observation: int) -> Tensor:
        return self.tensors[name][observation : observation + 1]

    def features(self, observation: int) -> Tensor:
        """Our backbone features; the file pads prompts with -1."""
        prompt = self.tensors["prompt"][observation]
        token_ids = prompt[prompt >= 0].long().unsqueeze(0)
        images = self.module.embed_images(self.pixels(observation))
        return self.module.backbone_features(self.module.embed_prompt(images, token_ids))

    def observed(self, observation: int) -> Observed:
        features = self.module.head_features(self.features(observation))
        return self.module.observe(features, self.row("state", observation))


@pytest.fixture(scope="module")
def golden() -> Iterator[Golden]:
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = dict(file.metadata())
    module = Gr00tN15Module(Gr00tN15Config.model_validate_json(metadata["config"])).eval()
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    module.load_state_dict(golden_weights(shapes, int(metadata["weights_seed"])))
    with torch.no_grad():
        yield Golden(load_file(GOLDEN), metadata, module)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_weights_are_regenerated_bit_for_bit(golden: Golden) -> None:
    digest = hashlib.sha256()
    state = golden.module.state_dict()
    for key in sorted(state):
        digest.update(state[key].numpy().tobytes())
    assert digest.hexdigest() == golden.metadata["weights_sha256"]


def test_golden_file_covers_prompts_of_different_lengths_and_an_inner_embodiment(
    golden: Golden,
) -> None:
    lengths = (golden.tensors["prompt"] >= 0).sum(-1).tolist()
    assert len(set(lengths)) == len(OBSERVATIONS)
    assert golden.module.config.embodiment_row == 2
    assert GOLDEN.stat().st_size <= 300_000


def test_siglip_features_match(golden: Golden) -> None:
    ours = golden.module.vision_model(golden.pixels(0)[0])
    assert largest_difference(ours, golden.tensors["siglip"]) <= TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_backbone_and_head_features_match(golden: Golden, observation: int) -> None:
    features = golden.features(observation)
    assert largest_difference(features, golden.tensors[f"features.{observation}"]) <= TOLERANCE
    ours = golden.module.head_features(features)
    theirs = golden.tensors[f"head_features.{observation}"]
    assert largest_difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_velocity_matches(golden: Golden, observation: int) -> None:
    step = golden.module.schedule(torch.tensor([float(golden.metadata["velocity_time"])]))
    noise, observed = golden.row("noise", observation), golden.observed(observation)
    ours = golden.module.velocity(noise, step, observed)
    assert largest_difference(ours, golden.row("velocity", observation)) <= TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_action_chunk_matches(golden: Golden, observation: int, steps: int) -> None:
    schedule = golden.module.schedule(torch.tensor(euler_times(steps)))
    noise, observed = golden.row("noise", observation), golden.observed(observation)
    ours = sample_chunk(golden.module, observed, noise, schedule, FlowClock())
    assert largest_difference(ours, golden.row(f"actions.{steps}", observation)) <= TOLERANCE
