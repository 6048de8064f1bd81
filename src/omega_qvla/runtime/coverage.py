"""What a recipe will do to each part of a policy, in words, before it is done."""

from __future__ import annotations

from omega_qvla.policies.base import Policy, sites_of
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.memory import DEAD, OVERHEAD, TABULATED

REMAINDER = "norms, biases and whatever else is no site keep the checkpoint's precision"


def coverage(policy: Policy, recipe: Recipe, parts: list[str]) -> dict[str, str]:
    """Words on each part of a memory table: what is quantized, what is kept, and why.

    Args:
        parts: names of the table's rows.
    """
    return {part: _words(policy, recipe, part) for part in parts}


def _words(policy: Policy, recipe: Recipe, part: str) -> str:
    if part == DEAD:
        return "left out"
    if part == OVERHEAD:
        return ""
    if part == TABULATED:
        return "a table over flow time" if recipe.adaptive_norm == "table" else _kept(recipe)
    if part == "token embedding":
        bits = recipe.embedding_bits
        return _kept(recipe) if bits == 16 else f"quantized to {bits} bits"
    sites = [site for site in sites_of(policy) if site.component == part]
    quantized = [site for site in sites if recipe.scheme_of(site) is not None]
    if not sites:
        return "kept: no sites"
    if not quantized:
        return f"{len(sites)} sites {_kept(recipe)}"
    scheme = recipe.scheme_of(quantized[0])
    assert scheme is not None
    how = f"W{scheme.weights.bits}A{scheme.activations.bits}"
    told = f"{len(quantized)} of {len(sites)} sites to {how}"
    if len(quantized) == len(sites):
        return told
    return f"{told}; its attention {_kept(recipe)}"


def _kept(recipe: Recipe) -> str:
    return f"kept: not quantized by {recipe.name}"
