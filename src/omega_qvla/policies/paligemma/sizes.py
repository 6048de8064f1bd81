"""The sizes of a network on PaliGemma from the shapes of its tensors.

Widths, depths, vocabulary and image size can be read off; heads are those of the published variants
in openpi's ``gemma.py``.
"""

from __future__ import annotations

from typing import NamedTuple

from omega_qvla.checkpoints.shapes import Shapes
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.checkpoints.tied import Tie
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.gemma import GemmaConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.layers.siglip_checkpoints import tower_sizes
from omega_qvla.policies.paligemma.names import (
    EMBED_TOKENS,
    EXPERT,
    EXPERT_LAYERS,
    HEAD,
    LANGUAGE,
    VISION,
)

EMBEDDING, TIED_HEAD = f"{EMBED_TOKENS}.weight", f"{HEAD}.weight"
TIE = Tie(EMBEDDING, TIED_HEAD)

GEMMA_VARIANTS: dict[str, GemmaConfig] = {
    "gemma_2b": GemmaConfig(width=2048, hidden=16384, heads=8, head_dim=256),
    "gemma_300m": GemmaConfig(width=1024, hidden=4096, heads=8, head_dim=256),
    "dummy": GemmaConfig(width=64, hidden=128, heads=8, head_dim=16),
}
"""openpi's ``gemma.py``."""


class Sizes(NamedTuple):
    """What the tensors say."""

    vision: VisionConfig
    backbone: GemmaConfig
    expert: GemmaConfig
    depth: int
    vocabulary: int
    action_dim: int


def require_tensor(stored: StoredTensors, name: str, title: str) -> None:
    """Refuse another network, which may differ by a few tensors only.

    Args:
        stored: as ``official_names`` gives them.
        name: a tensor that no other network on PaliGemma has.
        title: what the network is called.

    Raises:
        PolicyError: the tensor is not there.
    """
    if name not in stored.headers:
        raise PolicyError(f"{stored.where} is not a {title} checkpoint: it has no {name}")


def infer_sizes(stored: StoredTensors) -> Sizes:
    """The sizes of the network that these tensors are.

    Args:
        stored: as ``official_names`` gives them.

    Raises:
        PolicyError: a tensor is missing, or sizes are of no published variant.
    """
    shape = Shapes(stored)
    vocabulary, _ = shape(EMBEDDING, 2)
    action_dim, _ = shape("action_out_proj.weight", 2)
    return Sizes(
        vision=tower_sizes(shape, VISION),
        backbone=_gemma(shape, LANGUAGE),
        expert=_gemma(shape, EXPERT),
        depth=shape.depth(EXPERT_LAYERS),
        vocabulary=vocabulary,
        action_dim=action_dim,
    )


def _gemma(shape: Shapes, stem: str) -> GemmaConfig:
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
