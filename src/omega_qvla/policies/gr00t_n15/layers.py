"""Layers of GR00T N1.5 alone: the diffusion transformer and embodiments.

Semantics follow the public sources (NVIDIA's Isaac-GR00T at its N1.5 release, which builds on
diffusers' attention; checked in ``tests/parity``), parameter names are the official keys.
Shapes: ``B`` batch, ``T`` tokens, ``D`` width, ``h`` heads, ``d`` head width.

* The adaptive layer norm of the diffusion transformer has no gain of its own:
  y = layernorm(x) · (1 + scale) + shift, with (scale, shift) from a dense layer that reads the
  flow time alone.  They are computed outside the layer and passed in.  There is no gate.
* A layer of an *embodiment* has a matrix per robot, stacked: W [E, in, out] and b [E, out], used as
  x W[e] + b[e].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.attention import KeyValue, attend, attention_logits, split_heads
from omega_qvla.policies.layers.elementwise import (
    TORCH,
    Elementwise,
    ElementwiseModule,
)
from omega_qvla.policies.layers.modules import Node, shared_input
from omega_qvla.policies.layers.norms import LayerNorm

LAYER_NORM_EPS = 1e-5


class SelfAttention(nn.Module):
    """Plain multi-head self-attention with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D]; mask [B, 1, 1, T]: True may be seen."""
        q, k, v = (
            split_heads(y, self.head_dim) for y in shared_input(x, self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](attend(q, k, v, mask))

    def logits(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the softmax of ``forward`` sees, [B, h, T, T]."""
        q, k, _ = (
            split_heads(y, self.head_dim) for y in shared_input(x, self.to_q, self.to_k, self.to_v)
        )
        return attention_logits(q, k, mask)


class CrossAttention(nn.Module):
    """Attention to features that stay the same for a whole chunk: their keys and values do too."""

    def __init__(self, width: int, heads: int, feature_width: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(feature_width, width)
        self.to_v = nn.Linear(feature_width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def key_value(self, features: Tensor) -> KeyValue:
        """Features [B, S, F] → keys and values, each [B, h, S, d]."""
        key, value = shared_input(features, self.to_k, self.to_v)
        return split_heads(key, self.head_dim), split_heads(value, self.head_dim)

    def forward(self, x: Tensor, cross: KeyValue, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] → [B, T, D]; mask [B, 1, 1, S]: True may be seen."""
        query = split_heads(self.to_q(x), self.head_dim)
        return self.to_out[0](attend(query, *cross, mask))

    def logits(self, x: Tensor, cross: KeyValue, mask: Tensor | None = None) -> Tensor:
        """What the softmax of ``forward`` sees, [B, h, T, S]."""
        return attention_logits(split_heads(self.to_q(x), self.head_dim), cross[0], mask)


class FeedForward(ElementwiseModule):
    """net.2(gelu_tanh(net.0.proj(x))), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = Node()
        first.proj = nn.Linear(width, 4 * width)
        # Between and after the two sit dropouts, which do nothing here but count in the names.
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[0].get_submodule("proj")(x)
        return self.net[2](self.elementwise.activate("gelu_tanh", hidden))


class FeatureBlock(nn.Module):
    """Pre-norm transformer block over the features of the backbone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, LAYER_NORM_EPS)
        self.attn1 = SelfAttention(width, heads)
        self.norm3 = LayerNorm(width, LAYER_NORM_EPS)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class AdaptiveLayerNorm(ElementwiseModule):
    """Layer norm whose scale and shift come from the flow time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear: nn.Linear | None = nn.Linear(width, 2 * width)

    def modulation(self, condition: Tensor) -> Tensor:
        """Condition [B, D] → stacked (scale, shift), [B, 2, D]."""
        if self.linear is None:
            raise PolicyError("this adaptive norm was replaced by a step table")
        return self.linear(condition).unflatten(-1, (2, -1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Normalize x [B, T, D] with modulation [B, 2, D]."""
        return adaptive_layer_norm(x, modulation, elementwise=self.elementwise)


def adaptive_layer_norm(
    x: Tensor,
    modulation: Tensor,
    eps: float = LAYER_NORM_EPS,
    elementwise: Elementwise = TORCH,
) -> Tensor:
    """Normalize x [B, T, D] with modulation [B, 2, D]."""
    scale, shift = modulation.unsqueeze(-3).unbind(-2)
    return elementwise.adaptive_layer_norm(x, scale, shift, eps)


class _HeadBlock(ElementwiseModule):
    """What the two kinds of blocks of the diffusion transformer share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveLayerNorm(width)
        self.ff = FeedForward(width)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.ff(self.elementwise.layer_norm(x, LAYER_NORM_EPS))


class CrossBlock(_HeadBlock):
    """Attends to the features."""

    def __init__(self, width: int, heads: int, feature_width: int) -> None:
        super().__init__(width)
        self.attn1 = CrossAttention(width, heads, feature_width)

    def forward(
        self, x: Tensor, modulation: Tensor, cross: KeyValue, mask: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D], modulation [B, 2, D] → [B, T, D]."""
        attended = self.attn1(self.norm1(x, modulation), cross, mask)
        return self.feed_forward(x + attended)


class SelfBlock(_HeadBlock):
    """Attends to the state, future and action tokens themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width)
        self.attn1 = SelfAttention(width, heads)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, T, D], modulation [B, 2, D] → [B, T, D]."""
        return self.feed_forward(x + self.attn1(self.norm1(x, modulation)))


class EmbodimentLinear(nn.Module):
    """One matrix per embodiment, stacked; inputs are on the left of W, unlike in ``nn.Linear``.

    The stack may be in 16 bits: what an artifact stores so is not widened when it is loaded, since
    of 32 matrices one is used.  That one is widened when it is first asked for.
    """

    any_precision = True

    @property
    def read_share(self) -> float:
        """Which share of the stack one call reads."""
        return 1.0 / self.W.shape[0]

    def __init__(self, embodiments: int, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.empty((embodiments, inputs, outputs))
        self.W = nn.Parameter(weight if weight.is_meta else weight.normal_(0.0, 0.02))
        self.b = nn.Parameter(torch.zeros(embodiments, outputs))
        self._widened: tuple[int, Tensor, Tensor] | None = None

    def matrix(self, row: int) -> tuple[Tensor, Tensor]:
        """W [in, out] and b [out] of one row of the stack, float32."""
        if self.W.dtype == torch.float32:
            return self.W[row], self.b[row]
        if self._widened is None or self._widened[0] != row:
            self._widened = (row, self.W[row].to(torch.float32), self.b[row].to(torch.float32))
        return self._widened[1:]

    def forward(self, x: Tensor, row: int) -> Tensor:
        """x [B, T, in] → [B, T, out] with the matrix in this row of the stack."""
        weight, bias = self.matrix(row)
        if x.shape[-2] == 1:
            # One product per chunk: as one matrix of B rows it would be summed in another order
            # from some B on, and a robot's actions depend on how many others are served with it.
            return torch.bmm(x, weight.expand(x.shape[0], -1, -1)) + bias
        return x @ weight + bias


class EmbodimentMLP(nn.Module):
    """layer2(relu(layer1(x)))."""

    def __init__(self, embodiments: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layer1 = EmbodimentLinear(embodiments, inputs, hidden)
        self.layer2 = EmbodimentLinear(embodiments, hidden, outputs)

    def forward(self, x: Tensor, row: int) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, row)), row)


class ActionEncoder(nn.Module):
    """W3 silu(W2 [W1 a, code(t)]): noisy actions and the flow time become tokens.

    The half of W2 that reads the time code is the same for all actions of a step, and is therefore
    applied to the code once (``time_part``).
    """

    def __init__(self, embodiments: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.W1 = EmbodimentLinear(embodiments, action_dim, width)
        self.W2 = EmbodimentLinear(embodiments, 2 * width, width)
        self.W3 = EmbodimentLinear(embodiments, width, width)

    def time_part(self, code: Tensor, row: int) -> Tensor:
        """Code [B, D] → its share of W2's output, bias included, [B, 1, D]."""
        weight, bias = self.W2.matrix(row)
        return (code @ weight[code.shape[-1] :] + bias).unsqueeze(-2)

    def forward(self, actions: Tensor, time_part: Tensor, row: int) -> Tensor:
        """Actions [B, H, A] → [B, H, D]."""
        embedded = self.W1(actions, row)
        weight, _ = self.W2.matrix(row)
        hidden = embedded @ weight[: embedded.shape[-1]] + time_part
        return self.W3(F.silu(hidden), row)
