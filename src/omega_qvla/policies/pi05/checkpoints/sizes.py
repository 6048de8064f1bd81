"""The sizes of a pi0.5 network from the shapes of its tensors, where they say it beyond doubt.

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

ROOT = "paligemma_with_expert"
TOWER = f"{ROOT}.paligemma.model.vision_tower"
VISION = f"{TOWER}.vision_model"
PROJECTOR = f"{ROOT}.paligemma.model.multi_modal_projector.linear"
LANGUAGE = f"{ROOT}.paligemma.model.language_model"
EXPERT = f"{ROOT}.gemma_expert.model"
EMBEDDING = f"{LANGUAGE}.embed_tokens.weight"
TIED_HEAD = f"{ROOT}.paligemma.lm_head.weight"
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
        stored: as ``official_names`` gives them.

    Raises:
        PolicyError: not pi0.5, a tensor is missing, or sizes are of no published variant.
    """
    require_pi05(stored)
    shape = Shapes(stored)
    vocabulary, _ = shape(EMBEDDING, 2)
    action_dim, _ = shape("action_out_proj.weight", 2)
    return Sizes(
        vision=tower_sizes(shape, VISION),
        backbone=_gemma(shape, LANGUAGE),
        expert=_gemma(shape, EXPERT),
        depth=shape.depth(f"{EXPERT}.layers"),
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
