"""pi0.5 while it is trained: its share of the loss, and weights to start from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from omega_qvla.policies.layers.attention import KeyValue
from omega_qvla.policies.pi05.network import Pi05Module
from omega_qvla.policies.processing.prompts import STATE_BINS
from omega_qvla.policies.processing.tokenizers import WordTokenizer
from omega_qvla.training.dataset import Batch
from omega_qvla.training.learner import Learner, draw_dense, repeat


class Prefix(NamedTuple):
    """Keys and values of a prefix, and which of its places [B, P] are no padding."""

    cache: list[KeyValue]
    seen: Tensor


class Pi05Learner(Learner):
    """pi0.5 (``policies/pi05``)."""

    policy: Pi05Module
    direction = 1.0

    def __init__(self, module: Pi05Module) -> None:
        super().__init__(module, module.config.backbone.width)

    def embed_text(self, tokens: Tensor) -> Tensor:
        return self.policy.embed_text(tokens)

    def prefill(self, prompt: Tensor, seen: Tensor, batch: Batch) -> tuple[Tensor, Prefix]:
        positions = seen.long().cumsum(1) - 1
        cache, residual = self.policy.prefill(prompt, positions, seen[:, None, None, :])
        return residual, Prefix(cache, seen)

    def velocity(self, x_t: Tensor, times: Tensor, observed: Prefix) -> Tensor:
        seen, repeats = observed.seen, len(times) // len(observed.seen)
        cache = [
            (repeat(keys, repeats), repeat(values, repeats)) for keys, values in observed.cache
        ]
        return self.policy.velocity(
            x_t,
            self.policy.step_modulation(times),
            cache,
            self.policy.suffix_rotary(repeat(seen.sum(1, keepdim=True), repeats)),
            _suffix_mask(repeat(seen, repeats), x_t.shape[1]),
        )


def _suffix_mask(seen: Tensor, horizon: int) -> Tensor:
    """[B, 1, 1, P + horizon]: the prefix without padding, and every action token."""
    return torch.cat((seen, seen.new_ones(len(seen), horizon)), dim=1)[:, None, None, :]


def initialize_pi05(module: Pi05Module, tokenizer: WordTokenizer, seed: int) -> None:
    """Starting weights that suit a small network and a short run.

    Embeddings have unit norm after Gemma's √D, and the 257 numbers of the state's bins start as
    sines and cosines of their value, so that neighbouring bins are neighbours from the beginning;
    adaptive norms start with open gates.
    """
    generator = torch.Generator().manual_seed(seed)
    width = module.config.backbone.width
    with torch.no_grad():
        draw_dense(module, generator)
        for norm in module.adaptive_norms():
            if norm.dense is not None:
                norm.dense.weight.zero_()
                norm.dense.bias.zero_()
                norm.dense.bias.unflatten(0, (3, -1))[2] = 1.0
        module.action_out_proj.weight.mul_(0.1)
        positions = module.vision_model.embeddings.position_embedding.weight
        positions.normal_(0.0, 0.3, generator=generator)
        table = module.embed_tokens.get_parameter("weight")
        table.normal_(0.0, width**-0.5, generator=generator)
        frequency = torch.logspace(-1, 1.5, width // 2, base=4.0)
        for value in range(-1, STATE_BINS):
            angle = frequency * (2.0 * math.pi * value / STATE_BINS)
            code = torch.cat((angle.sin(), angle.cos())) * math.sqrt(2.0 / width)
            table[tokenizer.vocabulary.index(str(value))] = code
