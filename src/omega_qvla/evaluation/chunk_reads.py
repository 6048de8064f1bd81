"""What one chunk reads: how often the weights of each module, and how many tokens the backbone.

Counted while a chunk is computed.  A linear reads its weight when it is called.  Other modules hand
theirs to the module around them, so they count with the nearest one that is called.  Of an
embedding only single rows are read: none of its weight counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from omega_qvla.policies.base import Observation, sites_of
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime.embedding import QuantizedEmbedding


@contextmanager
def counted_calls(module: nn.Module) -> Iterator[Counter[str]]:
    """How often every module below this one is called inside the block, by path."""
    called: Counter[str] = Counter()

    def note(path: str) -> Any:
        def count(_module: nn.Module, _inputs: Any) -> None:
            called[path] += 1

        return count

    hooks = [child.register_forward_pre_hook(note(path)) for path, child in module.named_modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def weight_reads(module: nn.Module, called: Mapping[str, int]) -> dict[str, float]:
    """How often the tensors that each module holds are read, by path.

    Args:
        module: the network.
        called: as ``counted_calls`` gives it.

    Returns:
        Fractions for a stack of matrices of which one is used (``read_share``).
    """
    found: dict[str, float] = {}
    for path, child in module.named_modules():
        if isinstance(child, nn.Embedding | QuantizedEmbedding):
            found[path] = 0.0
        else:
            times = called.get(path, 0) if isinstance(child, nn.Linear) else _nearest(path, called)
            found[path] = float(getattr(child, "read_share", 1.0)) * times
    return found


def _nearest(path: str, called: Mapping[str, int]) -> int:
    """Calls of a module, or of the nearest one around it that is called."""
    while path and path not in called:
        path = path.rpartition(".")[0]
    return called.get(path, 0)


@torch.inference_mode()
def chunk_reads(policy: NativePolicy, observation: Observation) -> tuple[dict[str, float], int]:
    """What a chunk of this observation reads.

    Args:
        policy: full precision or quantized, its tensors in memory.
        observation: how many tokens there are depends on its prompt.

    Returns:
        ``weight_reads``, and the number of tokens the backbone reads, image tokens included.
    """
    policy.schedule(policy.steps)  # depends on the flow time alone: computed once, ahead
    first = next(site for site in sites_of(policy) if site.component == "backbone")
    tokens: list[int] = []
    hook = policy.module.get_submodule(first.linears[0]).register_forward_pre_hook(
        lambda _module, inputs: tokens.append(inputs[0].shape[-2])
    )
    noise = torch.zeros((1, *policy.noise_shape), device=policy.device)
    try:
        with counted_calls(policy.module) as called:
            policy.compute(policy.encode(observation).inputs, noise, policy.steps)
    finally:
        hook.remove()
    return weight_reads(policy.module, called), tokens[0]
