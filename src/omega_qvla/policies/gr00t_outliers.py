"""Which producers feed which linears in GR00T N1.5, for the outlier stress twin.

Backbone: each norm feeds q/k/v and gate/up; ``up_proj`` feeds ``down_proj`` through the gate.
Action head: the adaptive norm of a block feeds its queries, in odd blocks its keys and values too;
the norm before the feed-forward layers has no gain to scale.  In plain attention (one key and value
head per query head) channel j of the values is channel j of what ``to_out`` reads.  Vision and the
feature layers: layer norms feed the linears behind them, SigLIP's last one the projector.
"""

from __future__ import annotations

from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.stages import BLOCKS, FEATURES, LANGUAGE, PROJECTOR, VISION
from omega_qvla.policies.outlier_paths import OutlierPath, under
from omega_qvla.recipe import Scope

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TO_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def gr00t_outlier_pairs(config: Gr00tN15Config, scope: Scope = "paper") -> list[OutlierPath]:
    """Producer and consumers of every place that can carry outliers, in execution order.

    Args:
        config: gives the numbers of layers.
        scope: ``paper`` covers backbone and action head; ``all`` vision and feature layers too.
    """
    pairs = _vision(config) if scope == "all" else []
    for i in range(config.backbone.depth):
        layer = f"{LANGUAGE}.layers.{i}"
        gate_up = under(layer, ("mlp.gate_proj", "mlp.up_proj"))
        pairs += [
            OutlierPath("layer_norm", f"{layer}.input_layernorm", under(layer, _QKV)),
            OutlierPath("layer_norm", f"{layer}.post_attention_layernorm", gate_up),
            OutlierPath("linear", f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)),
        ]
    if scope == "all":
        pairs += _features(config)
    for i in range(config.head.depth):
        block = f"{BLOCKS}.{i}"
        readers = under(block, _TO_QKV if i % 2 else _TO_QKV[:1])
        pairs += [
            OutlierPath("adaptive_layer_norm", f"{block}.norm1.linear", readers),
            OutlierPath("linear", f"{block}.attn1.to_v", (f"{block}.attn1.to_out.0",)),
        ]
    return pairs


def _vision(config: Gr00tN15Config) -> list[OutlierPath]:
    pairs: list[OutlierPath] = []
    for i in range(config.vision.depth):
        layer = f"{VISION}.encoder.layers.{i}"
        pairs += [
            OutlierPath("layer_norm", f"{layer}.layer_norm1", under(layer, _QKV)),
            OutlierPath("layer_norm", f"{layer}.layer_norm2", (f"{layer}.mlp.fc1",)),
        ]
    return [*pairs, OutlierPath("layer_norm", f"{VISION}.post_layernorm", (PROJECTOR,))]


def _features(config: Gr00tN15Config) -> list[OutlierPath]:
    pairs: list[OutlierPath] = []
    for i in range(config.features.depth):
        block = f"{FEATURES}.{i}"
        pairs += [
            OutlierPath("layer_norm", f"{block}.norm1", under(block, _TO_QKV)),
            OutlierPath("linear", f"{block}.attn1.to_v", (f"{block}.attn1.to_out.0",)),
            OutlierPath("layer_norm", f"{block}.norm3", (f"{block}.ff.net.0.proj",)),
        ]
    return pairs
