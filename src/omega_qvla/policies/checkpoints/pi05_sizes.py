"""The sizes of a pi0.5 network from the shapes of its tensors, where they say it beyond doubt.

Widths, depths, vocabulary and image size can be read off.  How a projection is divided into heads
cannot, so it is taken from the published variants: openpi's ``gemma.py`` and SigLIP So400m/14.
A shape that fits none of them is refused rather than guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.shards import Header, StoredTensors
from omega_qvla.policies.pi05 import GemmaConfig, VisionConfig

ROOT = "paligemma_with_expert"
VISION = f"{ROOT}.paligemma.model.vision_tower.vision_model"
LANGUAGE = f"{ROOT}.paligemma.model.language_model"
EXPERT = f"{ROOT}.gemma_expert.model"
EMBEDDING = f"{LANGUAGE}.embed_tokens.weight"
TIED_HEAD = f"{ROOT}.paligemma.lm_head.weight"

GEMMA_VARIANTS: dict[str, GemmaConfig] = {
    "gemma_2b": GemmaConfig(width=2048, hidden=16384, heads=8, head_dim=256),
    "gemma_300m": GemmaConfig(width=1024, hidden=4096, heads=8, head_dim=256),
    "dummy": GemmaConfig(width=64, hidden=128, heads=8, head_dim=16),
}
"""openpi's ``gemma.py``."""

VISION_HEADS: dict[tuple[int, int], int] = {(1152, 4304): 16}
"""(width, hidden width) of a SigLIP tower → its attention heads."""


class Sizes(NamedTuple):
    """What the tensors say."""

    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    depth: int
    vocabulary: int
    action_dim: int


def untie(stored: StoredTensors) -> StoredTensors:
    """Call the embedding by its name where the file has it as the head it is tied to.

    openpi and LeRobot write with ``save_model``, which keeps one name of a shared tensor: the head.
    """
    if EMBEDDING in stored.headers or TIED_HEAD not in stored.headers:
        return stored
    return stored.renamed(lambda name: EMBEDDING if name == TIED_HEAD else name)


def require_pi05(stored: StoredTensors) -> None:
    """Refuse the neighbours of pi0.5, which differ by a few tensors only.

    Raises:
        PolicyError: the tensors are those of pi0, of pi0-FAST, or of something else.
    """
    names = stored.headers
    if f"{EXPERT}.layers.0.input_layernorm.dense.weight" in names:
        return
    if any(name.startswith(("state_proj.", "action_time_mlp_in.")) for name in names):
        raise PolicyError(
            f"{stored.where} is a pi0 checkpoint (it has state_proj and action_time_mlp_in); this "
            "version reads pi0.5"
        )
    raise PolicyError(
        f"{stored.where} is not a pi0.5 checkpoint: it has no "
        f"{EXPERT}.layers.0.input_layernorm.dense.weight"
    )


def infer_sizes(stored: StoredTensors) -> Sizes:
    """The sizes of the network that these tensors are.

    Args:
        stored: official names without prefix, after ``untie``.

    Raises:
        PolicyError: not pi0.5, a tensor is missing, or sizes are of no published variant.
    """
    require_pi05(stored)
    shape = _Shapes(stored.headers, stored.where)
    vocabulary, _ = shape(EMBEDDING, 2)
    action_dim, _ = shape("action_out_proj.weight", 2)
    return Sizes(
        vision=_vision(shape),
        backbone=_gemma(shape, LANGUAGE),
        expert=_gemma(shape, EXPERT),
        depth=_depth(stored.headers, f"{EXPERT}.layers"),
        vocabulary=vocabulary,
        action_dim=action_dim,
    )


class _Shapes:
    """Shapes of tensors that must be there."""

    def __init__(self, headers: Mapping[str, Header], where: str) -> None:
        self.headers, self.where = headers, where

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.headers:
            raise PolicyError(f"{self.where} does not fit the policy: missing {name}")
        shape = self.headers[name].shape
        if len(shape) != rank or 0 in shape:
            raise PolicyError(f"{self.where}: {name} has shape {list(shape)}, expected rank {rank}")
        return shape


def _vision(shape: _Shapes) -> VisionConfig:
    width, _, patch, _ = shape(f"{VISION}.embeddings.patch_embedding.weight", 4)
    positions, _ = shape(f"{VISION}.embeddings.position_embedding.weight", 2)
    hidden, _ = shape(f"{VISION}.encoder.layers.0.mlp.fc1.weight", 2)
    edge = math.isqrt(positions)
    if edge * edge != positions:
        raise PolicyError(f"{shape.where}: {positions} vision positions are no square of patches")
    heads = VISION_HEADS.get((width, hidden))
    if heads is None:
        raise PolicyError(
            f"{shape.where} has a vision tower of width {width} and hidden width {hidden}, of "
            f"which no number of heads is known; known: {sorted(VISION_HEADS)}. Give the sizes in "
            "a config.json (docs/checkpoints.md)"
        )
    return VisionConfig(
        width=width,
        hidden=hidden,
        heads=heads,
        depth=_depth(shape.headers, f"{VISION}.encoder.layers"),
        image_size=edge * patch,
        patch_size=patch,
    )


def _gemma(shape: _Shapes, stem: str) -> GemmaConfig:
    hidden, width = shape(f"{stem}.layers.0.mlp.gate_proj.weight", 2)
    query, _ = shape(f"{stem}.layers.0.self_attn.q_proj.weight", 2)
    key, _ = shape(f"{stem}.layers.0.self_attn.k_proj.weight", 2)
    for config in GEMMA_VARIANTS.values():
        sizes = (config.heads * config.head_dim, config.kv_heads * config.head_dim)
        if (config.width, config.hidden, *sizes) == (width, hidden, query, key):
            return config
    raise PolicyError(
        f"{shape.where}: {stem} has width {width}, hidden width {hidden}, queries {query} and keys "
        f"{key}, which is none of {', '.join(GEMMA_VARIANTS)}; give the sizes in a config.json "
        "(docs/checkpoints.md)"
    )


def _depth(headers: Mapping[str, Header], stem: str) -> int:
    pattern = re.compile(re.escape(stem) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, headers) if m), default=-1)
