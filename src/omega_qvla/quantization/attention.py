"""Matching an action head's 16-bit attention to full precision (QuantVLA, arXiv 2602.20309).

A selective layout leaves the head's attention projections in 16 bits, but they read what quantized
layers made of the observation, and two things drift.  The spread of a head's logits is the inverse
temperature of its softmax, and the size of the layer's output decides how much it adds to the
residual stream.  Both are brought back by one factor each, measured on calibration observations:

    α_h = std(logits of head h, full) / std(…, quantized)        attention temperature matching
    β_l = rms(output of layer l, full) / rms(…, quantized)       output head balancing

β is measured with every α in place.  A factor within 3 % of 1 (|log| < 0.03) is noise and becomes
1; none leaves e^±0.4, as in the paper.  Rotary embedding and products are linear, so α multiplies
the rows of the query projection and β those of the output projection: nothing is added at run
time, and an artifact just holds other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.checkpoints.weight_store import weights_on
from omega_qvla.devices import CPU
from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import AttentionLayer, HasHeadAttention, Observation, Policy

NEUTRAL = 0.03
"""|log factor| below which nothing is changed."""

LIMIT = 0.4
"""Largest |log factor|."""


def require_head_attention(policy: Policy) -> HasHeadAttention:
    """The policy, which must say where its head attends.

    Raises:
        PolicyError: it does not.
    """
    if not isinstance(policy, HasHeadAttention):
        raise PolicyError(
            f"a {policy.family} policy does not name the attention layers of its action head, "
            "which match_attention scales; use a recipe without it"
        )
    return policy


@dataclass(frozen=True)
class AttentionFactors:
    """What to multiply in one attention layer.

    Attributes:
        layer: the layer.
        query: α [h] float64, one per head.
        output: β.
    """

    layer: AttentionLayer
    query: Tensor
    output: float


def matching_factor(full: Tensor, quantized: Tensor) -> Tensor:
    """full / quantized with the neutral band and the limit applied; 1 where either is zero.

    Args:
        full: sizes in full precision, any shape, not negative.
        quantized: the same sizes after quantization.

    Returns:
        Factors of the same shape, float64, in [e^-LIMIT, e^LIMIT].
    """
    known = (full > 0) & (quantized > 0)
    one = torch.ones_like(full, dtype=torch.float64)
    log = (torch.where(known, full, one) / torch.where(known, quantized, one)).log()
    return torch.where(log.abs() < NEUTRAL, one, log.clamp(-LIMIT, LIMIT).exp())


def match_attention(
    full: Policy,
    quantized: Policy,
    observations: Iterable[Observation],
    seed: int,
    device: torch.device = CPU,
) -> list[AttentionFactors]:
    """The factors of every attention layer of the action head.

    Args:
        full: full precision; what it keeps per schedule is left where it computed.
        quantized: the same policy, quantized; its attention projections are scaled in place.
        observations: calibration data.
        seed: observation i is sampled with noise of seed + i, the same for both.
        device: where both are sampled, one after the other; factors and weights stay on the CPU.

    Raises:
        PolicyError: the policy does not say where its head attends.
    """
    layers, given = require_head_attention(full).head_attention(), list(observations)
    reference = _measure(full, layers, given, seed, device)
    drifted = _measure(quantized, layers, given, seed, device)
    queries = {
        layer.path: matching_factor(reference[layer.path].spread(), drifted[layer.path].spread())
        for layer in layers
    }
    scale_attention(quantized, [AttentionFactors(x, queries[x.path], 1.0) for x in layers])
    drifted = _measure(quantized, layers, given, seed, device)
    factors: list[AttentionFactors] = []
    for layer in layers:
        full_size, size = reference[layer.path].size(), drifted[layer.path].size()
        factors.append(
            AttentionFactors(layer, queries[layer.path], float(matching_factor(full_size, size)))
        )
    return factors


def scale_attention(policy: Policy, factors: Sequence[AttentionFactors]) -> None:
    """Multiply the factors into the policy's query and output projections.

    The policy's modules get parameters of their own; those shared with other copies stay as they
    were.  A parameter that fits 16 bits is rounded to bfloat16 again.
    """
    for item in factors:
        query = policy.module.get_submodule(item.layer.query)
        _scale_rows(query, item.query.repeat_interleave(item.layer.head_dim))
        _scale_rows(policy.module.get_submodule(item.layer.output), torch.tensor(item.output))


def _scale_rows(linear: nn.Module, factor: Tensor) -> None:
    """Multiply the rows of weight and bias by a factor [N] or a number."""
    if bool((factor == 1.0).all()):
        return
    for name, parameter in list(linear.named_parameters(recurse=False)):
        rows = factor.unsqueeze(-1) if factor.ndim and parameter.ndim == 2 else factor
        scaled = (parameter.to(torch.float64) * rows).to(parameter.dtype)
        if torch.equal(parameter.to(torch.bfloat16).to(parameter.dtype), parameter):
            scaled = scaled.to(torch.bfloat16).to(parameter.dtype)
        setattr(linear, name, nn.Parameter(scaled, requires_grad=False))


@dataclass
class _Sizes:
    """Running moments of one layer: logits per head, and the output."""

    heads: int
    count: float = 0.0
    total: Tensor = field(init=False)
    square: Tensor = field(init=False)
    outputs: float = 0.0
    energy: float = 0.0

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.heads, dtype=torch.float64)
        self.square = torch.zeros(self.heads, dtype=torch.float64)

    def add_logits(self, logits: Tensor) -> None:
        """Logits [B, h, T, S]; hidden ones are -inf and do not count."""
        seen = torch.isfinite(logits)
        values = torch.where(seen, logits, torch.zeros_like(logits)).to(torch.float64)
        self.count += float(seen.sum()) / self.heads
        self.total += values.sum(dim=(0, 2, 3)).cpu()
        self.square += values.square().sum(dim=(0, 2, 3)).cpu()

    def add_output(self, output: Tensor) -> None:
        self.outputs += output.numel()
        self.energy += float(output.square().sum(dtype=torch.float64))

    def spread(self) -> Tensor:
        """Standard deviation of each head's logits [h]."""
        mean = self.total / max(self.count, 1.0)
        return (self.square / max(self.count, 1.0) - mean.square()).clamp(min=0.0).sqrt()

    def size(self) -> Tensor:
        """Root mean square of the output, a scalar."""
        return torch.tensor(self.energy / max(self.outputs, 1.0), dtype=torch.float64).sqrt()


def _measure(
    policy: Policy,
    layers: Sequence[AttentionLayer],
    observations: Sequence[Observation],
    seed: int,
    device: torch.device,
) -> dict[str, _Sizes]:
    """Sample a chunk per observation and watch the layers."""
    found: dict[str, _Sizes] = {}
    handles: list[Any] = []
    for layer in layers:
        module: Any = policy.module.get_submodule(layer.path)
        sizes = found[layer.path] = _Sizes(layer.heads)

        def watch_inputs(attention: Any, inputs: tuple[Any, ...], sizes: _Sizes = sizes) -> None:
            sizes.add_logits(attention.logits(*inputs))

        def watch_output(_module: Any, _inputs: Any, output: Tensor, sizes: _Sizes = sizes) -> None:
            sizes.add_output(output)

        handles.append(module.register_forward_pre_hook(watch_inputs))
        projection = policy.module.get_submodule(layer.output)
        handles.append(projection.register_forward_hook(watch_output))
    try:
        with weights_on(policy.module, policy.store, [""], device):
            for number, observation in enumerate(observations):
                generator = torch.Generator().manual_seed(seed + number)
                policy.sample_actions(observation, generator=generator)
    finally:
        for handle in handles:
            handle.remove()
    return found
