"""An artifact of a policy's true shapes with random integers: ``random_artifact.py POLICY OUT``.

Speed, memory and load time of a quantized policy depend on its shapes, not on its values.  This
gives in a minute what ``bench policy`` needs of full-size pi0.5, without the hour that quantizing
it takes; what such a policy does is noise, and its model card says that nothing was calibrated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from omega_qvla.policies.base import QuantizationSite, linears_of, sites_of
from omega_qvla.policies.loading import stream_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.weight_store import hold
from omega_qvla.quantization.embedding import quantize_rows
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.quantization.transforms import BlockTransform
from omega_qvla.quantization.weights import QuantizedWeight
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.engine import QuantizedPolicy, build

_INTEGER_SPREAD = 4.6
"""Standard deviation of integers drawn from all sixteen values."""


def random_site(
    policy: NativePolicy, site: QuantizationSite, recipe: Recipe, generator: torch.Generator
) -> QuantizedSite:
    """Random integers and orthogonal blocks where quantization would have put its own."""
    scheme = recipe.scheme_of(site)
    assert scheme is not None
    linears = linears_of(policy.module, site)
    width, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
    block = scheme.transform.block
    padded = -(-width // block) * block
    blocks, _ = torch.linalg.qr(torch.randn((padded // block, block, block), generator=generator))
    integers = torch.randint(-8, 8, (outputs, padded), generator=generator, dtype=torch.int8)
    scale = torch.full((outputs,), padded**-0.5 / _INTEGER_SPREAD)
    static = scheme.activations.scale == "per_step"
    biased = linears[0].bias is not None
    return QuantizedSite(
        site=site,
        in_features=width,
        splits=tuple(linear.out_features for linear in linears),
        weight=QuantizedWeight(integers, scale),
        weight_bits=4,
        transform=BlockTransform(blocks.bfloat16().float(), None, block, width),
        bias=torch.zeros(outputs) if biased else None,
        activations=scheme.activations,
        activation_scale=torch.full((policy.steps,), 0.4) if static else None,
        activation_times=1.0 - torch.arange(policy.steps) / policy.steps if static else None,
        note="random integers, not quantized from anything",
    )


def random_artifact(source: str) -> QuantizedPolicy:
    """A policy's shapes with random integers in place of its linears."""
    policy, recipe = stream_policy(source), Recipe.load("omega-w4a4")
    generator = torch.Generator().manual_seed(0)
    sites = [random_site(policy, site, recipe, generator) for site in sites_of(policy)]
    path = policy.embedding_path
    with hold(policy.module, policy.store, [path]):
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
    random_artifact(sys.argv[1]).save_pretrained(Path(sys.argv[2]))
