"""Which producers feed which linears: where outliers can be injected, by policy family.

pi0.5's backbone: each norm feeds q/k/v and gate/up; ``up_proj`` feeds ``down_proj`` through the
gate, a multiplication.  The last layer keeps nothing but k and v.  Action expert: the same behind
adaptive norms, whose gain is produced by a dense layer; pi0's are plain norms.

GR00T N1.5's backbone is as pi0.5's.  Action head: the adaptive norm of a block feeds its queries,
in odd blocks its keys and values too; the norm before the feed-forward layers has no gain to scale.
In plain attention (one key and value head per query head) channel j of the values is channel j of
what ``to_out`` reads.

Vision towers and feature layers: layer norms feed the linears behind them, SigLIP's last one the
projector (fc1 → fc2 has a nonlinearity in between and cannot be rescaled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.config import Gr00tN15Config
from omega_qvla.policies.gr00t_n15.stages import BLOCKS, FEATURES, LANGUAGE, PROJECTOR, VISION
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.pi0.config import Pi0Config
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.recipe import Scope

OutlierKind = Literal["rms_norm", "layer_norm", "adaptive_norm", "adaptive_layer_norm", "linear"]
"""How a producer stores its gain; see the table in ``outlier_injection.py``."""


@dataclass(frozen=True)
class OutlierPath:
    """A producer of channels and everything that reads them.

    Attributes:
        kind: how the producer stores its gain.
        producer: dotted path of the norm, of the adaptive norm's dense linear, or of the linear.
        consumers: dotted paths of all linears that read the producer's output.
    """

    kind: OutlierKind
    producer: str
    consumers: tuple[str, ...]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_TO_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def outlier_paths(policy: NativePolicy, scope: Scope) -> list[OutlierPath]:
    """Every place of a policy that can carry outliers, in execution order.

    Args:
        scope: ``paper`` covers backbone and action head; ``all`` everything before them too.

    Raises:
        PolicyError: nothing is known of the policy's family.
    """
    if policy.family not in _PATHS:
        raise PolicyError(
            f"outliers cannot be injected into policies of family {policy.family!r}: "
            f"evaluation/outlier_paths.py knows {', '.join(_PATHS)}; leave --stress out"
        )
    return _PATHS[policy.family](policy.config, scope)


def pi05_paths(config: Pi05Config, scope: Scope = "paper") -> list[OutlierPath]:
    """Of pi0.5, see :func:`outlier_paths`."""
    return _paligemma(config, scope, "adaptive_norm", ".dense")


def pi0_paths(config: Pi0Config, scope: Scope = "paper") -> list[OutlierPath]:
    """Of pi0, see :func:`outlier_paths`."""
    return _paligemma(config, scope, "rms_norm", "")


def _paligemma(
    config: PaligemmaConfig, scope: Scope, norm: OutlierKind, produced_by: str
) -> list[OutlierPath]:
    """A policy on PaliGemma, whose expert has norms of a kind."""
    paligemma = "paligemma_with_expert.paligemma.model"
    paths: list[OutlierPath] = []
    if scope == "all":
        tower, projector = f"{paligemma}.vision_tower.vision_model", "multi_modal_projector.linear"
        paths += _vision(tower, config.vision.depth, f"{paligemma}.{projector}")
    for i in range(config.depth):
        layer = f"{paligemma}.language_model.layers.{i}"
        if i == config.depth - 1:
            keys_values = _under(layer, _QKV[1:])
            paths.append(OutlierPath("rms_norm", f"{layer}.input_layernorm", keys_values))
            continue
        paths += _layer(layer, "rms_norm", "")
    for i in range(config.depth):
        layer = f"paligemma_with_expert.gemma_expert.model.layers.{i}"
        paths += _layer(layer, norm, produced_by)
    return paths


def gr00t_paths(config: Gr00tN15Config, scope: Scope = "paper") -> list[OutlierPath]:
    """Of GR00T N1.5, see :func:`outlier_paths`."""
    paths: list[OutlierPath] = []
    if scope == "all":
        paths += _vision(VISION, config.vision.depth, PROJECTOR)
    for i in range(config.backbone.depth):
        paths += _layer(f"{LANGUAGE}.layers.{i}", "layer_norm", "")
    if scope == "all":
        paths += _features(config)
    for i in range(config.head.depth):
        block = f"{BLOCKS}.{i}"
        readers = _under(block, _TO_QKV if i % 2 else _TO_QKV[:1])
        paths += [
            OutlierPath("adaptive_layer_norm", f"{block}.norm1.linear", readers),
            OutlierPath("linear", f"{block}.attn1.to_v", (f"{block}.attn1.to_out.0",)),
        ]
    return paths


def _layer(layer: str, norm: OutlierKind, produced_by: str) -> list[OutlierPath]:
    """A layer of a language model: two norms of a kind, and the half that the gate lets pass."""
    attention, mlp = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
    return [
        OutlierPath(norm, f"{attention}{produced_by}", _under(layer, _QKV)),
        OutlierPath(norm, f"{mlp}{produced_by}", _under(layer, _GATE_UP)),
        OutlierPath("linear", f"{layer}.mlp.up_proj", (f"{layer}.mlp.down_proj",)),
    ]


def _vision(tower: str, depth: int, projector: str) -> list[OutlierPath]:
    """A SigLIP tower."""
    paths: list[OutlierPath] = []
    for i in range(depth):
        layer = f"{tower}.encoder.layers.{i}"
        paths += [
            OutlierPath("layer_norm", f"{layer}.layer_norm1", _under(layer, _QKV)),
            OutlierPath("layer_norm", f"{layer}.layer_norm2", (f"{layer}.mlp.fc1",)),
        ]
    return [*paths, OutlierPath("layer_norm", f"{tower}.post_layernorm", (projector,))]


def _features(config: Gr00tN15Config) -> list[OutlierPath]:
    paths: list[OutlierPath] = []
    for i in range(config.features.depth):
        block = f"{FEATURES}.{i}"
        paths += [
            OutlierPath("layer_norm", f"{block}.norm1", _under(block, _TO_QKV)),
            OutlierPath("linear", f"{block}.attn1.to_v", (f"{block}.attn1.to_out.0",)),
            OutlierPath("layer_norm", f"{block}.norm3", (f"{block}.ff.net.0.proj",)),
        ]
    return paths


def _under(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of several modules below one."""
    return tuple(f"{prefix}.{name}" for name in names)


_PATHS: Mapping[str, Callable[[Any, Scope], list[OutlierPath]]] = {
    "pi05": pi05_paths,
    "pi0": pi0_paths,
    "gr00t_n15": gr00t_paths,
}
