"""Quantize the embedded pi0.5 and look inside: bytes, integers of one layer, error of the actions.

    python examples/look_inside.py [--recipe rtn] [--out out/inside]

Reads the artifact with nothing but safetensors and numpy, to show that what is stored is all there
is: four-bit integers, a scale per output, one 64 × 64 transform per block of inputs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import omega_qvla as oq

POLICY = "builtin:tiny-pi05"


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8] → the integers [N, K], −8 to 7: element j of a word has the bits 4j … 4j+3."""
    shifts = torch.arange(0, 32, 4)
    return ((words.unsqueeze(-1) >> shifts & 15) - 8).flatten(1)


def effective_weight(site: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [N, K] that a site multiplies its untransformed inputs with.

    y = (x T) W'ᵀ = x (T W'ᵀ), block by block, where W' are the integers times their scales.
    """
    stored = unpack(site["weight_packed"]) * site["weight_scale"][:, None]
    if "transform" in site:
        blocks = stored.unflatten(1, (-1, site["transform"].shape[1]))  # [N, K/B, B]
        stored = torch.einsum("nkb,kab->nka", blocks, site["transform"].float()).flatten(1)
    return stored[:, : int(site["weight_shape"][1])]


def relative(difference: np.ndarray, reference: np.ndarray) -> float:
    """Sum of squares over sum of squares."""
    return float((difference**2).sum() / (reference**2).sum())


def main() -> None:
    """Print what there is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="omega-w4a4")
    parser.add_argument("--out", type=Path, default=Path("out/inside"))
    options = parser.parse_args()
    policy = oq.load_policy(POLICY)
    observations = oq.Observations.load(POLICY)
    quantized = oq.quantize(policy, observations, options.recipe)
    quantized.save_pretrained(options.out)

    report = quantized.memory_report()
    print(f"bytes: {report['total_bytes']:,} of {report['reference_bytes']:,} in 16 bits")

    config = json.loads((options.out / "omega_config.json").read_text("utf-8"))
    tensors = {}
    for file in sorted(options.out.glob("model-*.safetensors")):
        tensors |= load_file(file)
    name = next(site["name"] for site in config["sites"] if "gemma_expert" in site["name"])
    site = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    print(f"\n{name} stores")
    for key, tensor in sorted(site.items()):
        print(f"  {key:24} {tensor.dtype!s:16} {list(tensor.shape)}")
    counts = torch.bincount((unpack(site["weight_packed"]) + 8).flatten(), minlength=16)
    print("integers −8 … 7:", " ".join(f"{100 * c / counts.sum():.1f}%" for c in counts))
    linears = next(site["linears"] for site in config["sites"] if site["name"] == name)
    module = dict(policy.module.named_modules())
    original = torch.cat([module[linear].weight.detach() for linear in linears])
    difference = effective_weight(site) - original
    print(f"error of the weight: {relative(difference.numpy(), original.numpy()):.4f}")

    source = np.random.default_rng(0)
    first, second = source.standard_normal((2, *policy.noise_shape)).astype(np.float32)
    observation = observations[0]
    exact = policy.sample_actions(observation, first)
    chunk = quantized.sample_actions(observation, noise=first)
    other = policy.sample_actions(observation, second)
    print(f"\nerror of one action chunk: {relative(chunk - exact, exact):.4f}")
    print(f"the same for full precision with other noise: {relative(other - exact, exact):.4f}")


if __name__ == "__main__":
    main()
