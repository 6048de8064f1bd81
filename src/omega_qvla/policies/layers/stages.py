"""Stages and sites of layers that several families are made of.

One stage per transformer layer, so that calibration holds one layer's activations at a time; one
site per set of linears that read the same input (q/k/v, gate/up).
"""

from __future__ import annotations

from collections.abc import Sequence

from omega_qvla.policies.base import Component, QuantizationSite, Stage, State
from omega_qvla.policies.layers.siglip import SiglipVisionModel

Groups = Sequence[tuple[str, tuple[str, ...]]]
"""Site and the linears in it, both below the path of a layer."""

_QKV = ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
SIGLIP: Groups = (
    _QKV,
    ("self_attn.out_proj", ("self_attn.out_proj",)),
    ("mlp.fc1", ("mlp.fc1",)),
    ("mlp.fc2", ("mlp.fc2",)),
)
GATED: Groups = (
    _QKV,
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)
"""Layers with a gated MLP: Gemma's and Qwen's."""
KEY_VALUE: Groups = (("self_attn.kv_proj", ("self_attn.k_proj", "self_attn.v_proj")),)
"""A last layer of which only keys and values are read."""


def layer_sites(
    path: str, component: Component, groups: Groups, *, per_step: bool = False
) -> tuple[QuantizationSite, ...]:
    """The sites of one layer.

    Args:
        path: of the layer in the module.
        component: the part of the policy it belongs to.
        groups: which of its linears go together.
        per_step: whether it runs once per denoising step.
    """
    return tuple(
        QuantizationSite(
            f"{path}.{name}", tuple(f"{path}.{member}" for member in members), component, per_step
        )
        for name, members in groups
    )


def vision_stages(tower: SiglipVisionModel, path: str) -> list[Stage]:
    """SigLIP up to its final norm: ``pixels`` [1, V, 3, S, S] → ``image_tokens`` [V, patches, D].

    Args:
        tower: the image tower.
        path: of it in the module.
    """

    def patches(state: State) -> State:
        rest = {name: value for name, value in state.items() if name != "pixels"}
        return {**rest, "image_tokens": tower.embeddings(state["pixels"].flatten(0, 1))}

    def layer(i: int) -> Stage:
        def run(state: State) -> State:
            return {**state, "image_tokens": tower.encoder.layers[i](state["image_tokens"])}

        at = f"{path}.encoder.layers.{i}"
        return Stage(f"vision layer {i}", run, layer_sites(at, "vision", SIGLIP), (at,))

    depth = len(tower.encoder.layers)
    return [
        Stage("patches", patches, reads=(f"{path}.embeddings",)),
        *(layer(i) for i in range(depth)),
    ]
