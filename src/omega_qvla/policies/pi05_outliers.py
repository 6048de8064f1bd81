"""Which producers feed which linears in pi0.5, for the outlier stress twin.

Backbone: each norm feeds q/k/v and gate/up; ``up_proj`` feeds ``down_proj`` through the gate, a
multiplication.  The last layer keeps nothing but k and v.  Action expert: the same behind adaptive
norms, whose gain is produced by a dense layer.  Vision: layer norms feed q/k/v and fc1, the final
one the projector (fc1 → fc2 has a nonlinearity in between and cannot be rescaled).
"""

from __future__ import annotations

from omega_qvla.policies.outlier_paths import OutlierPath, under
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.recipe import Scope

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


def pi05_outlier_pairs(config: Pi05Config, scope: Scope = "paper") -> list[OutlierPath]:
    """Producer and consumers of every place that can carry outliers, in execution order.

    Args:
        config: gives the number of layers.
        scope: ``paper`` covers backbone and action expert; ``all`` the vision tower too.
    """
    paligemma = "paligemma_with_expert.paligemma.model"
    pairs: list[OutlierPath] = []
    if scope == "all":
        vision = f"{paligemma}.vision_tower.vision_model"
        for i in range(config.vision.depth):
            layer = f"{vision}.encoder.layers.{i}"
            pairs += [
                OutlierPath("layer_norm", f"{layer}.layer_norm1", under(layer, _QKV)),
                OutlierPath("layer_norm", f"{layer}.layer_norm2", (f"{layer}.mlp.fc1",)),
            ]
        projector = f"{paligemma}.multi_modal_projector.linear"
        pairs.append(OutlierPath("layer_norm", f"{vision}.post_layernorm", (projector,)))
    for i in range(config.depth):
        layer = f"{paligemma}.language_model.layers.{i}"
        if i == config.depth - 1:
            pairs.append(
                OutlierPath("rms_norm", f"{layer}.input_layernorm", under(layer, _QKV[1:]))
            )
            continue
        pairs += [
            OutlierPath("rms_norm", f"{layer}.input_layernorm", under(layer, _QKV)),
            OutlierPath("rms_norm", f"{layer}.post_attention_layernorm", under(layer, _GATE_UP)),
            OutlierPath("linear", f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)),
        ]
    for i in range(config.depth):
        layer = f"paligemma_with_expert.gemma_expert.model.layers.{i}"
        attention, mlp = f"{layer}.input_layernorm.dense", f"{layer}.post_attention_layernorm.dense"
        pairs += [
            OutlierPath("adaptive_norm", attention, under(layer, _QKV)),
            OutlierPath("adaptive_norm", mlp, under(layer, _GATE_UP)),
            OutlierPath("linear", f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)),
        ]
    return pairs
