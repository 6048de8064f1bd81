"""The sizes of a GR00T N1.5 network from the shapes of its tensors, where they say it beyond doubt.

The language model's heads follow from its normalization of queries and keys, which has the width of
one head.  The heads of the vision tower, of the feature layers and of the diffusion transformer do
not show; they come from the checkpoint's own ``config.json`` where there is one, else from the
published sizes.
"""

from __future__ import annotations

from typing import NamedTuple

from omega_qvla.checkpoints.shapes import Shapes
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.checkpoints.tied import Tie
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.config import TransformerConfig
from omega_qvla.policies.layers.qwen3 import QwenConfig
from omega_qvla.policies.layers.siglip import VisionConfig
from omega_qvla.policies.layers.siglip_checkpoints import tower_sizes

EAGLE = "backbone.eagle_model"
TOWER = f"{EAGLE}.vision_model"
VISION = f"{TOWER}.vision_model"
LANGUAGE = f"{EAGLE}.language_model.model"
EMBEDDING = f"{LANGUAGE}.embed_tokens.weight"
TIED_HEAD = f"{EAGLE}.language_model.lm_head.weight"
TIE = Tie(EMBEDDING, TIED_HEAD)
FEATURES = "action_head.vl_self_attention.transformer_blocks"
BLOCKS = "action_head.model.transformer_blocks"

FEATURE_HEADS: dict[int, int] = {2048: 32}
"""Width of the feature layers → their heads, as published."""

HEAD_HEADS: dict[int, int] = {1536: 32}
"""Width of the diffusion transformer → its heads, as published."""


class Sizes(NamedTuple):
    """What the tensors say."""

    vision: VisionConfig
    backbone: QwenConfig
    features: TransformerConfig
    head: TransformerConfig
    head_hidden: int
    future_tokens: int
    positions: int
    vocabulary: int
    action_dim: int
    state_width: int
    embodiments: tuple[int, ...]


def infer_sizes(stored: StoredTensors, heads: tuple[int, int] | None = None) -> Sizes:
    """The sizes of the network that these tensors are.

    Args:
        stored: as ``official_names`` gives them.
        heads: of the feature layers and of the diffusion transformer, where something says them.

    Raises:
        PolicyError: not GR00T N1.5, a tensor is missing, or heads are not known.
    """
    if "action_head.future_tokens.weight" not in stored.headers:
        raise PolicyError(
            f"{stored.where} is not a GR00T N1.5 checkpoint: it has no "
            "action_head.future_tokens.weight (other releases have other networks)"
        )
    shape = Shapes(stored)
    vocabulary, width = shape(EMBEDDING, 2)
    rows, state_width, head_hidden = shape("action_head.state_encoder.layer1.W", 3)
    _, action_dim, head_width = shape("action_head.action_encoder.W1.W", 3)
    feature_heads, block_heads = heads or _published_heads(stored.where, width, head_width)
    return Sizes(
        vision=tower_sizes(shape, VISION),
        backbone=_qwen(shape, width),
        features=TransformerConfig(width=width, heads=feature_heads, depth=shape.depth(FEATURES)),
        head=TransformerConfig(width=head_width, heads=block_heads, depth=shape.depth(BLOCKS)),
        head_hidden=head_hidden,
        future_tokens=shape("action_head.future_tokens.weight", 2)[0],
        positions=shape("action_head.position_embedding.weight", 2)[0],
        vocabulary=vocabulary,
        action_dim=action_dim,
        state_width=state_width,
        embodiments=tuple(range(rows)),
    )


def _qwen(shape: Shapes, width: int) -> QwenConfig:
    query, _ = shape(f"{LANGUAGE}.layers.0.self_attn.q_proj.weight", 2)
    key, _ = shape(f"{LANGUAGE}.layers.0.self_attn.k_proj.weight", 2)
    (head_dim,) = shape(f"{LANGUAGE}.layers.0.self_attn.q_norm.weight", 1)
    hidden, _ = shape(f"{LANGUAGE}.layers.0.mlp.gate_proj.weight", 2)
    return QwenConfig(
        width=width,
        hidden=hidden,
        heads=query // head_dim,
        kv_heads=key // head_dim,
        head_dim=head_dim,
        depth=shape.depth(f"{LANGUAGE}.layers"),
    )


def _published_heads(where: str, features: int, head: int) -> tuple[int, int]:
    if features not in FEATURE_HEADS or head not in HEAD_HEADS:
        raise PolicyError(
            f"{where} has widths {features} (feature layers) and {head} (diffusion transformer), "
            "which are not the published ones, so their numbers of heads are not known"
        )
    return FEATURE_HEADS[features], HEAD_HEADS[head]
