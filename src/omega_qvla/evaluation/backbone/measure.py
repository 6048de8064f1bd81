"""How far a quantized language model is from full precision, in next-token distributions.

Per chunk of text, over all its tokens but the last: KL(p ‖ q) = Σ p (log p - log q), p being full
precision's distribution of the next token and q the recipe's, and the cross entropy of the token
that follows, whose exponential is the perplexity.  The output head is not quantized, so both are
made of hidden states by the same matrix.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from omega_qvla.api import quantize
from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.backbone.model import FILE, LanguagePolicy
from omega_qvla.evaluation.backbone.text import CHUNK
from omega_qvla.evaluation.measured_rows import error_ratio
from omega_qvla.evaluation.openloop import Array
from omega_qvla.policies.base import Observation
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe
from omega_qvla.results.backbone import BackboneBench, BackboneRow
from omega_qvla.results.statistics import bootstrap_total
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.prediction import site_bytes, weight_storage

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Read:
    """What a model makes of the chunks.

    Attributes:
        hidden: [T, D] of each.
        ms_per_chunk: median time of one.
    """

    hidden: Sequence[Tensor]
    ms_per_chunk: float


def read(
    policy: LanguagePolicy | QuantizedPolicy | SimulatedPolicy, text: Sequence[Observation]
) -> Read:
    """Hidden states of every chunk."""
    hidden: list[Tensor] = []
    times: list[float] = []
    for observation in text:
        begun = time.perf_counter()
        hidden.append(policy.sample_actions(observation))
        times.append(1e3 * (time.perf_counter() - begun))
    return Read(hidden, statistics.median(times))


@torch.inference_mode()
def divergence(
    policy: LanguagePolicy, reference: Tensor, hidden: Tensor, tokens: Tensor
) -> tuple[float, float]:
    """Mean KL(reference ‖ hidden) and cross entropy of one chunk, in nats.

    Args:
        policy: whose output head makes logits of hidden states.
        reference, hidden: [T, D] by full precision and by a recipe.
        tokens: [T] int64.
    """
    wanted, found = (
        policy.module.logits(states[:-1]).log_softmax(-1) for states in (reference, hidden)
    )
    kl = (wanted.exp() * (wanted - found)).sum(dim=-1, dtype=torch.float64).mean()
    entropy = -found.gather(1, tokens[1:, None]).mean(dtype=torch.float64)
    return max(float(kl), 0.0), float(entropy)


def measure_backbone(
    policy: LanguagePolicy,
    recipes: Sequence[Recipe],
    calibration: Sequence[Observation],
    text: Sequence[Observation],
    *,
    split: str,
    progress: Progress,
    machine: str,
    command: str,
) -> BackboneBench:
    """Quantize with every recipe and measure it.

    Args:
        policy: the model in full precision.
        calibration: chunks to calibrate on; a recipe takes as many as it says.
        text: chunks to measure on; ``split`` is their name.
        progress: called with (recipe, sites done, sites in all).
        machine, command: what made the rows.
    """
    reference, shares = read(policy, text), dict[str, Array]()
    exact = _entropies(policy, reference, reference, text)
    rows: list[BackboneRow] = []
    ordered = sorted(recipes, key=lambda recipe: recipe.name != DEFAULT_RECIPE)
    for recipe in ordered:
        begun = time.perf_counter()
        made = quantize(
            policy,
            calibration,
            recipe,
            progress=lambda done, total, _, name=recipe.name: progress(name, done, total),
        )
        seconds = time.perf_counter() - begun
        found = read(made, text)
        del made
        measured = _entropies(policy, reference, found, text)
        shares[recipe.name] = measured[:, 0] / len(text)
        rows.append(_row(policy, recipe, shares, measured, seconds, found.ms_per_chunk))
    order = [recipe.name for recipe in recipes]
    return BackboneBench(
        model=FILE,
        weights=weights_fingerprint(policy),
        calibration=Observations(calibration).fingerprint,
        text=Observations(text).fingerprint,
        split=split,
        chunks=len(text),
        tokens=CHUNK,
        perplexity=_perplexity(exact),
        ms_per_chunk=round(reference.ms_per_chunk, 1),
        threads=torch.get_num_threads(),
        machine=machine,
        library=f"omega-qvla {version('omega-qvla')}",
        command=command,
        rows=sorted(rows, key=lambda row: order.index(row.recipe)),
    )


def _entropies(
    policy: LanguagePolicy, reference: Read, found: Read, text: Sequence[Observation]
) -> Array:
    """Divergence and cross entropy of every chunk, [n, 2]."""
    pairs = zip(reference.hidden, found.hidden, text, strict=True)
    return np.array([divergence(policy, one, other, o["tokens"]) for one, other, o in pairs])


def _perplexity(measured: Array) -> float:
    return float(np.exp(measured[:, 1].mean()))


def _row(
    policy: LanguagePolicy,
    recipe: Recipe,
    shares: dict[str, Array],
    measured: Array,
    seconds: float,
    ms_per_chunk: float,
) -> BackboneRow:
    ours, default = shares[recipe.name], shares.get(DEFAULT_RECIPE)
    versus = None
    if default is not None and recipe.name != DEFAULT_RECIPE:
        versus = error_ratio(ours, default)
    return BackboneRow(
        recipe=recipe.name,
        recipe_hash=recipe.content_hash,
        realizable=recipe.realizable,
        kl=float(f"{ours.sum():.6g}"),
        kl_ci95=bootstrap_total(ours),
        kls=[float(f"{share:.4g}") for share in ours],
        kl_vs_default=versus,
        perplexity=float(f"{_perplexity(measured):.6g}"),
        bits_per_weight=weight_storage(policy, recipe).bits_per_weight,
        decoder_bytes=sum(site_bytes(policy, recipe).values()),
        quantize_s=round(seconds, 1),
        ms_per_chunk=round(ms_per_chunk, 1),
    )
