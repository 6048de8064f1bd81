"""Full precision in bfloat16: what integers on a GPU are to be compared with.

Weights are bfloat16, products and convolutions and attention too; the layers are the policy's own,
with PyTorch's ``autocast`` deciding the type of every operation (norms that lose too much in 16
bits are computed in float32).  The flow is integrated in float32.  A policy made so samples through
a pass like any other, which can be captured as a graph (``graph.py``): the gain of the graph and
that of the integers can then be distinguished.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omega_qvla.checkpoints.weight_store import named_values
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.native import NativePolicy, Pass


def in_bfloat16(policy: NativePolicy, device: torch.device | str) -> NativePolicy:
    """A full-precision policy with bfloat16 weights on a device; the given one is not changed.

    Args:
        policy: in memory or streamed; one parameter at a time is read and moved.
        device: where it is to compute.

    Raises:
        PolicyError: a parameter has no value.
    """
    target = policy.clone()
    for name, value in named_values(policy.module, policy.store):
        path, _, kind = name.rpartition(".")
        moved = value.to(device, torch.bfloat16, copy=True)
        setattr(target.module.get_submodule(path), kind, nn.Parameter(moved, requires_grad=False))
    target.store = None
    target.use_pass(bfloat16_pass(target))
    return target


def bfloat16_pass(policy: NativePolicy) -> Pass:
    """The policy's pass under ``autocast``; weights are bfloat16 already, so none is converted."""

    def run(
        inputs: Sequence[Tensor], noise: Tensor, steps: int, guidance: Guidance | None = None
    ) -> Tensor:
        kind = policy.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=False):
            return policy.compute(inputs, noise, steps, guidance).to(torch.float32)

    return run
