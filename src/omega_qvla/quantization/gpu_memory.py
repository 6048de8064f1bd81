"""How much GPU memory quantizing a policy takes, from shapes alone.

What is there at once is one stage: its parameters in float32, and for each of its sites

* the statistics: a second moment [K, K] and a row sample [1024, K] per denoising step;
* while it is its turn, the moment gathered anew where channels are permuted or padded, its factor
  in float32 and in the float64 that is tried when float32 will not do, some tiles of it, and the
  weight [N, K] in its several states: stacked, folded, propagated, dequantized again.

Before the first stage the token embedding is there alone.  Matching attention runs the whole policy
in full precision.  ``WORKSPACE`` stands for the activations of one observation and what PyTorch and
the driver keep.  **An estimate, for a refusal before the work rather than in the middle of it**:
compare it with the peak that ``make bench-gpu`` reports.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from omega_qvla.calibration.capture import moment_bytes, sample_bytes
from omega_qvla.policies.base import HasEmbedding, Policy, QuantizationSite, Stage, linears_of
from omega_qvla.quantization.site import needs_statistics
from omega_qvla.recipe import Recipe, Scheme

WORKSPACE = 1 << 30
"""Bytes assumed for what is neither weight nor statistic.  Not measured."""

_FLOAT32, _FLOAT64 = 4, 8
_WEIGHT_STATES = 6
"""Float32 copies of a weight that are alive at once, at most."""
_BRANCH_STATES = 4
"""Float64 copies that a singular value decomposition of it takes beside those."""
_TILE, _TILES = 2048, 3
"""Side of the tiles in which a [K, K] is made symmetric or inverted, and how many are alive."""


def gpu_bytes(policy: Policy, recipe: Recipe) -> int:
    """GPU memory that ``quantize_policy`` needs, in bytes."""
    steps = int(getattr(policy, "steps", 1))
    largest = max(_stage_bytes(policy, recipe, stage, steps) for stage in policy.stages())
    if recipe.embedding_bits != 16 and isinstance(policy, HasEmbedding):
        # The table, its integers in parts and joined, and their scales: 4 + 1 + 1 bytes a value.
        table = policy.module.get_parameter(f"{policy.embedding_path}.weight").numel()
        largest = max(largest, 7 * table)
    if recipe.match_attention:
        largest = max(largest, _parameter_bytes([policy.module]))
    return WORKSPACE + largest


def _stage_bytes(policy: Policy, recipe: Recipe, stage: Stage, steps: int) -> int:
    held = _parameter_bytes([policy.module.get_submodule(path) for path in stage.reads])
    statistics, work = 0, 0
    for site in stage.sites:
        scheme = recipe.scheme_of(site)
        if scheme is not None:
            known = steps if site.per_step else 1
            seen, busy = _site_bytes(policy.module, site, scheme, known)
            statistics, work = statistics + seen, max(work, busy)
    return held + statistics + work


def _site_bytes(
    module: nn.Module, site: QuantizationSite, scheme: Scheme, steps: int
) -> tuple[int, int]:
    """What a site's statistics take while its stage is at work, and what it takes itself."""
    linears = linears_of(module, site)
    inputs, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
    work = _WEIGHT_STATES * _FLOAT32 * inputs * outputs
    if scheme.weights.low_rank is not None:
        work += _BRANCH_STATES * _FLOAT64 * inputs * outputs
    if not needs_statistics(scheme):
        return 0, work
    work += (_FLOAT32 + _FLOAT64) * inputs**2 + _TILES * _FLOAT64 * min(inputs, _TILE) ** 2
    if scheme.transform.permutation != "none" or inputs % scheme.transform.block:
        work += 2 * moment_bytes(inputs)
    return moment_bytes(inputs) + steps * sample_bytes(inputs), work


def _parameter_bytes(modules: Sequence[nn.Module]) -> int:
    return _FLOAT32 * sum(p.numel() for module in modules for p in module.parameters())
