"""What openpi's own PyTorch code computed of a shrunken policy, beside our module (docs/parity.md).

A golden file holds three observations (a masked last camera with a padded prompt, a masked middle
camera with a full prompt, and all cameras with a short prompt) and openpi's outputs; the weights
are drawn again by ``golden_weights``.  openpi masks, in one padded batch; we drop, one observation
at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from omega_qvla.policies.layers.attention import KeyValue
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.network import PaligemmaModule

OBSERVATIONS = (0, 1, 2)
STEPS = (1, 4, 7, 10)
FORWARD_TOLERANCE = 2e-5
"""Everything up to one velocity agrees to 2e-6 where it was recorded (values are about 5 at most);
this leaves a decade for another platform's summation order."""
CHUNK_TOLERANCE = 1e-4
"""Action chunks differ more: openpi finds its flow times by subtracting 1/steps over and over in
float32, we use 1 - i/steps, and the fastest time feature turns 2π/0.004 radians per unit of time,
so that rounding alone moved actions by up to 3.9e-5 (10 steps).  At openpi's own times chunks agree
to 1e-6, which ``FORWARD_TOLERANCE`` holds."""

M = TypeVar("M", bound=PaligemmaModule)


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
class Golden(Generic[M]):
    """The recorded tensors, their metadata, and our module with the same weights."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    module: M

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

    def of(self, name: str, observation: int) -> Tensor:
        """One observation's row of a recorded tensor, [1, ...]."""
        return self.tensors[name][observation : observation + 1]


def load_golden(path: Path, config_type: type[PaligemmaConfig], module_type: type[M]) -> Golden[M]:
    """A golden file and a module of its configuration with its weights."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    module = module_type(config_type.model_validate_json(metadata["config"])).eval()  # type: ignore[call-arg]
    module.requires_grad_(False)
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    module.load_state_dict(golden_weights(shapes, int(metadata["weights_seed"])))
    return Golden(load_file(path), metadata, module)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all weights in sorted order of their names."""
    digest, state = hashlib.sha256(), module.state_dict()
    for key in sorted(state):
        digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Of two tensors of one shape."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def accumulated_times(steps: int) -> list[float]:
    """Openpi's flow times: 1, then 1/steps subtracted again and again in float32."""
    time, times = torch.tensor(1.0), []
    for _ in range(steps):
        times.append(time.item())
        time = time - 1.0 / steps
    return times
