"""What a policy is to the rest of the house.

A vision-language-action policy maps an observation (camera images, a sentence, the robot's own
state) to an *action chunk*: the next ``horizon`` actions, produced by integrating a learned
velocity field from noise (t = 1) to actions (t = 0).  Everything that quantizes, runs or evaluates
a policy sees it through three ideas defined here:

* a **site** is the unit of quantization: one linear, or several that read the same input and can
  therefore share one transform and one quantized activation (q/k/v, gate/up);
* a **stage** is the unit of calibration: a piece of the forward pass (typically one transformer
  layer) that maps a small per-observation state to the next one.  Running stages one after the
  other lets calibration see every site's input with all earlier sites already quantized, while
  only one layer's activations exist at a time;
* the **flow clock** says which denoising step is being computed.  It belongs to the policy, so
  that per-step activation scales need no globals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from omega_qvla.checkpoints.weight_store import WeightStore
from omega_qvla.errors import PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.slots import LinearSlot
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking

Observation = Mapping[str, Any]
"""One observation as the robot (or the user's own module) provides it."""

State = dict[str, Any]
"""What flows between stages for one observation: named tensors, or lists of them."""

Component = Literal["vision", "projector", "backbone", "action_head"]
"""Parts of a policy that a recipe can treat differently."""

PAPER_SCOPE: tuple[Component, ...] = ("backbone", "action_head")
"""What the paper quantizes, and counts its memory over (arXiv 2605.28803, section 4)."""

_ATTENTION = re.compile(r"(^|\.)(\w*attn\d*|(self_|cross_)?attention)\.")
"""A module that holds attention projections: self_attn, attn1, attention, …"""


@dataclass(frozen=True)
class QuantizationSite:
    """Linears that share one input and are quantized together.

    Attributes:
        name: stable, unique name; the prefix of the site's tensors in an artifact.
        linears: dotted module paths of the linears, in the order their outputs are concatenated.
        component: the part of the policy the site belongs to.
        per_step: whether the site runs once per denoising step (and may have per-step scales).
    """

    name: str
    linears: tuple[str, ...]
    component: Component
    per_step: bool = False

    @property
    def attention(self) -> bool:
        """Whether it belongs to an attention layer, by the path of its linears."""
        return _ATTENTION.search(self.linears[0]) is not None


@dataclass(frozen=True)
class Stage:
    """One calibratable piece of the forward pass.

    Attributes:
        name: for progress lines and error messages.
        run: maps the state of one observation to the state after this stage.
        sites: the sites executed inside, in execution order.
        reads: dotted paths of the modules whose parameters it computes with.
    """

    name: str
    run: Callable[[State], State]
    sites: tuple[QuantizationSite, ...] = ()
    reads: tuple[str, ...] = ()


class Policy(Protocol):
    """What quantization needs of a policy; native families and ``TorchPolicy`` provide it."""

    family: str
    clock: FlowClock
    dropped_parameters: int
    store: WeightStore | None
    """Where parameters without values of their own are; None when all are in memory."""
    decisions: Mapping[str, str]
    """What was decided about the checkpoint, question → answer; empty where nothing had to be."""

    @property
    def module(self) -> nn.Module:
        """The network whose linears are quantized."""
        ...

    def clone(self) -> Policy:
        """A structural copy that shares every tensor: modules may be replaced in it freely."""
        ...

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Configuration and processor files that rebuild everything but the tensors."""
        ...

    def component_of(self, parameter: str) -> str:
        """The part of the policy a parameter belongs to, for memory tables."""
        ...

    def stages(self) -> Sequence[Stage]:
        """The forward pass as stages, in execution order."""
        ...

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        """The state the first stage starts from; ``generator`` draws the sampling noise."""
        ...

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | torch.Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        previous: np.ndarray | torch.Tensor | None = None,
        delay: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> Any:
        """One action chunk, [horizon, action_dim] float32 in the robot's units."""
        ...


@runtime_checkable
class HasEmbedding(Protocol):
    """A policy with a token embedding that may be stored as int8 rows."""

    @property
    def embedding_path(self) -> str:
        """Where the token embedding sits in the module."""
        ...


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer of the action head.

    Attributes:
        path: the module, whose ``logits`` takes what its ``forward`` takes and gives what the
            softmax sees, [B, h, T, S], -inf where a mask hides it.
        query: path of the linear that makes queries, ``heads`` × ``head_dim`` rows.
        output: path of the linear after attention.
        heads: number of query heads.
        head_dim: width of one.
    """

    path: str
    query: str
    output: str
    heads: int
    head_dim: int


@runtime_checkable
class HasHeadAttention(Protocol):
    """A policy that says where its action head attends."""

    def head_attention(self) -> Sequence[AttentionLayer]:
        """The head's attention layers, in execution order."""
        ...


def linears_of(module: nn.Module, site: QuantizationSite) -> list[nn.Linear]:
    """The full-precision linears of a site.

    Raises:
        PolicyError: a path does not lead to an ``nn.Linear``.
    """
    found: list[nn.Linear] = []
    for name in site.linears:
        linear = module.get_submodule(name)
        if isinstance(linear, LinearSlot):
            linear = linear.linear
        if not isinstance(linear, nn.Linear):
            raise PolicyError(f"{name!r} is a {type(linear).__name__}, not an nn.Linear")
        found.append(linear)
    return found


def sites_of(policy: Policy) -> list[QuantizationSite]:
    """All sites of a policy in execution order."""
    return [site for stage in policy.stages() for site in stage.sites]
