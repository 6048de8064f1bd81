"""The stages that pi0 and pi0.5 begin with: vision, projector, and the layers of the backbone.

One stage per transformer layer, so that calibration holds one layer's activations at a time; one
site per set of linears that read the same input (q/k/v, gate/up).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from omega_qvla.policies.base import AttentionLayer, QuantizationSite, Stage, State
from omega_qvla.policies.layers.stages import GATED, KEY_VALUE, layer_sites, vision_stages
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.names import (
    BACKBONE_LAYERS,
    EMBED_TOKENS,
    EXPERT_LAYERS,
    PROJECTOR,
    VISION,
)
from omega_qvla.policies.paligemma.network import PaligemmaModule


def component_of(parameter: str, others: Mapping[str, str]) -> str:
    """The part of the policy a parameter (or a site's tensor) belongs to, for memory tables.

    Args:
        parameter: its name.
        others: part of a name → component, of what stands beside PaliGemma; looked at in turn.
    """
    known = {
        "vision_tower.": "vision",
        "multi_modal_projector.": "projector",
        "embed_tokens.": "token embedding",
        "language_model.": "backbone",
        **others,
        "gemma_expert.": "action_head",
    }
    found = (component for marker, component in known.items() if marker in parameter)
    return next(found, "action projections")


def prefix_stages(module: PaligemmaModule) -> list[Stage]:
    """The forward pass up to the backbone's last layer, as calibration stages.

    The state of one observation starts with ``pixels`` [1, V, 3, S, S] and ``token_ids`` [1, T];
    afterwards there are the ``prefix`` [1, P, D] and the ``cache`` of all layers instead.  Whatever
    else is in it stays.
    """

    def project(state: State) -> State:
        normed = module.vision_model.post_layernorm(state["image_tokens"])
        images = module.projector(normed).flatten(0, 1).unsqueeze(0)
        prefix = torch.cat((images, module.embed_text(state["token_ids"])), dim=1)
        used = ("image_tokens", "token_ids")
        rest = {name: value for name, value in state.items() if name not in used}
        return {**rest, "prefix": prefix, "cache": ()}

    def backbone_layer(i: int) -> Stage:
        def run(state: State) -> State:
            prefix = state["prefix"]
            positions = torch.arange(prefix.shape[1], device=prefix.device).unsqueeze(0)
            out, kv = module.backbone_layers[i](prefix, module.prefix_rotary(positions))
            return {**state, "prefix": out, "cache": (*state["cache"], kv)}

        groups = KEY_VALUE if i == module.config.depth - 1 else GATED
        path = f"{BACKBONE_LAYERS}.{i}"
        return Stage(f"backbone layer {i}", run, layer_sites(path, "backbone", groups), (path,))

    site = QuantizationSite(PROJECTOR, (PROJECTOR,), "projector")
    reads = (f"{VISION}.post_layernorm", PROJECTOR, EMBED_TOKENS)
    return [
        *vision_stages(module.vision_model, VISION),
        Stage("projector", project, (site,), reads),
        *(backbone_layer(i) for i in range(module.config.depth)),
    ]


def expert_attention(config: PaligemmaConfig) -> list[AttentionLayer]:
    """Where the action expert attends, in execution order."""
    heads, width = config.expert.heads, config.expert.head_dim
    paths = [f"{EXPERT_LAYERS}.{i}.self_attn" for i in range(config.depth)]
    return [AttentionLayer(p, f"{p}.q_proj", f"{p}.o_proj", heads, width) for p in paths]
