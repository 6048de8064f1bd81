"""An artifact of a policy's true shapes with random integers.

    python benchmarks/random_artifact.py POLICY OUT [RECIPE]

Speed, memory and load time of a quantized policy depend on its shapes and its recipe, not on its
values.  This gives in a minute what ``bench policy`` needs of full-size pi0.5, without the hour
that quantizing it takes; what such a policy does is noise, and its model card says that nothing was
calibrated.  The recipe is the default one, or another that differs from it in its activations.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from omega_qvla.checkpoints.weight_store import weights_on
from omega_qvla.flow_time import euler_times
from omega_qvla.policies.base import QuantizationSite, linears_of, sites_of
from omega_qvla.policies.full_precision import stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.embedding import quantize_rows
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.transforms import BlockTransform, padded_width
from omega_qvla.quantization.weights import QuantizedWeight
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scheme
from omega_qvla.runtime.engine import QuantizedPolicy, build

_INTEGER_SPREAD = 4.6
"""Standard deviation of integers drawn from all sixteen values."""


def random_site(
    policy: NativePolicy, site: QuantizationSite, recipe: Recipe, generator: torch.Generator
) -> QuantizedSite:
    """Random integers, orthogonal blocks and offsets where quantization would have put its own."""
    scheme = recipe.scheme_of(site)
    if scheme is None or not _can_be_drawn(scheme):
        raise ValueError(f"recipe {recipe.name!r}: cannot draw what it stores of {site.name!r}")
    linears = linears_of(policy.module, site)
    width, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
    block = scheme.transform.block
    padded = padded_width(width, block)
    blocks, _ = torch.linalg.qr(torch.randn((padded // block, block, block), generator=generator))
    integers = torch.randint(-8, 8, (outputs, padded), generator=generator, dtype=torch.int8)
    scale = torch.full((outputs,), padded**-0.5 / _INTEGER_SPREAD)
    static, centred = scheme.activations.scale == "per_step", scheme.activations.subtract_mean
    # What runs once per observation, cross-attention's keys and values, has one offset.
    times = torch.tensor(euler_times(policy.steps) if site.per_step else [1.0])
    offset = bias = None
    if centred:
        offset = torch.randn((len(times), padded), generator=generator).bfloat16().float()
        bias = torch.zeros(len(times), outputs)
    elif linears[0].bias is not None:
        bias = torch.zeros(outputs)
    return QuantizedSite(
        site=site,
        in_features=width,
        splits=tuple(linear.out_features for linear in linears),
        weight=QuantizedWeight(integers, scale),
        weight_bits=4,
        transform=BlockTransform(blocks.bfloat16().float(), None, block, width),
        bias=bias,
        activations=scheme.activations,
        activation_scale=torch.full((len(times),), 0.4) if static else None,
        activation_times=times if static or centred else None,
        offset=offset,
        note="random integers, not quantized from anything",
    )


def _can_be_drawn(scheme: Scheme) -> bool:
    weights, activations, transform = scheme.weights, scheme.activations, scheme.transform
    return (
        (weights.bits, weights.group, weights.low_rank) == (4, None, None)
        and activations.scale in ("per_step", "per_token")
        and activations.clip != "search"
        and not transform.identity
        and transform.permutation == "none"
    )


def random_artifact(source: str, name: str = DEFAULT_RECIPE) -> QuantizedPolicy:
    """A policy's shapes with random integers in place of its linears.

    Raises:
        ValueError: the recipe stores something that is not drawn here; names the site.
    """
    policy, recipe = stream_policy(source), Recipe.load(name)
    generator = torch.Generator().manual_seed(0)
    sites = [random_site(policy, site, recipe, generator) for site in sites_of(policy)]
    path = policy.embedding_path
    with weights_on(policy.module, policy.store, [path]):
        embedding = quantize_rows(path, policy.module.get_parameter(f"{path}.weight"), 4)
    quantization = Quantization(
        recipe=recipe,
        sites=sites,
        embedding=embedding,
        step_table=policy.tabulate_modulation(recipe.table_step_counts),
        calibration="none: random integers",
        observations=0,
    )
    built = build(policy, quantization)
    assert isinstance(built, QuantizedPolicy)
    return built


if __name__ == "__main__":
    random_artifact(sys.argv[1], *sys.argv[3:]).save_pretrained(Path(sys.argv[2]))
