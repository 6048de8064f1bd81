"""What ``omega_config.json`` says of a quantized policy (docs/artifact.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from omega_qvla.artifact.layout import Layout, embedding_layout
from omega_qvla.errors import ArtifactError
from omega_qvla.policies.base import (
    PAPER_SCOPE,
    Policy,
    QuantizationSite,
    linears_of,
    sites_of,
)
from omega_qvla.quantization.pipeline import Quantization
from omega_qvla.quantization.stored import SiteRecord, require_layout
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.memory import DEAD, STEP_TABLE, TABULATED


def describe(policy: Policy, quantization: Quantization) -> dict[str, Any]:
    """The content of ``omega_config.json`` for a policy that was quantized so."""
    structure, _ = policy.describe()
    recipe = quantization.recipe
    return {
        "library_version": version("omega-qvla"),
        "policy": {
            "family": policy.family,
            "config": structure,
            **({"decisions": dict(policy.decisions)} if policy.decisions else {}),
        },
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.content_hash,
        "calibration": {
            "fingerprint": quantization.calibration,
            "observations": quantization.observations,
            **({"warnings": [*quantization.warnings]} if quantization.warnings else {}),
        },
        "sites": [SiteRecord.of(site, recipe).dump() for site in quantization.sites],
        "kept": kept_linears(sites_of(policy), recipe),
        "components": _components(policy, quantization),
        "embedding": None
        if quantization.embedding is None
        else {"path": quantization.embedding.path, "bits": quantization.embedding.bits},
        "adaptive_norm": "keep" if quantization.step_table is None else "table",
        "reference_parameters": reference_parameters(policy),
    }


def _components(policy: Policy, quantization: Quantization) -> dict[str, list[str]]:
    """The names of all tensors that stay what they are, by the part of the policy they are of."""
    covered = {name for site in quantization.sites for name in site.site.linears}
    found: dict[str, list[str]] = {}
    for name in policy.module.state_dict():
        component = policy.component_of(name)
        tabulated = quantization.step_table is not None and component == TABULATED
        if name.rpartition(".")[0] not in covered and not tabulated:
            found.setdefault(component, []).append(name)
    return found


def reference_parameters(policy: Policy) -> dict[str, dict[str, int]]:
    """Parameters of the checkpoint by component: all of them, and the paper's linears alone."""
    counts: Counter[str] = Counter()
    for name, parameter in policy.module.named_parameters():
        counts[policy.component_of(name)] += parameter.numel()
    if policy.dropped_parameters:
        counts[DEAD] = policy.dropped_parameters
    narrow = dict.fromkeys(PAPER_SCOPE, 0)
    for site in sites_of(policy):
        if site.component in narrow:
            linears = linears_of(policy.module, site)
            narrow[site.component] += sum(linear.weight.numel() for linear in linears)
    return {
        "all": dict(counts),
        "paper_scope": {part: narrow[part] for part in PAPER_SCOPE if narrow[part]},
    }


def kept_linears(sites: Iterable[QuantizationSite], recipe: Recipe) -> list[str]:
    """Linears in 16 bits although their component is quantized (a selective layout)."""
    return [
        name
        for site in sites
        if recipe.scheme(site.component) is not None and recipe.scheme_of(site) is None
        for name in site.linears
    ]


def require_tensors(policy: Policy | None, config: Mapping[str, Any], stored: Layout) -> None:
    """Hold the tensors of sites and embedding against what recipe and policy imply.

    Args:
        policy: the structure; its tensors do not matter.  None for a module of the user's own that
            is not at hand: whether its linears have biases is then taken from what is stored.
        config: the content of ``omega_config.json``.
        stored: every tensor of the artifact.

    Raises:
        ArtifactError: one is missing, additional, misshaped or mistyped; names it.
    """
    recipe = Recipe.model_validate(config["recipe"])
    expected: Layout = {}
    owners: set[str] = set()
    for item in config["sites"]:
        record, biased = SiteRecord.model_validate(item), None
        if policy is not None:
            linears = linears_of(policy.module, record.site)
            widths = sorted({linear.in_features for linear in linears})
            splits = tuple(linear.out_features for linear in linears)
            if widths != [record.in_features] or splits != record.splits:
                raise ArtifactError(
                    f"site {record.site.name!r}: the policy has {splits} outputs of {widths} "
                    f"inputs, omega_config.json has {record.splits} of {record.in_features}"
                )
            biased = any(linear.bias is not None for linear in linears)
        expected |= record.layout(recipe, stored, biased=biased)
        owners |= {record.site.name, *record.site.linears}
    if config["embedding"] is not None and policy is not None:
        path = str(config["embedding"]["path"])
        rows, width = policy.module.get_parameter(f"{path}.weight").shape
        kinds = embedding_layout(config["embedding"]["bits"], rows, width)
        expected |= {f"{path}.{kind}": spec for kind, spec in kinds.items()}
        owners.add(path)
    require_layout(stored, expected)
    if config["adaptive_norm"] == "table":
        for name in (f"{STEP_TABLE}.times", f"{STEP_TABLE}.values"):
            if name not in stored:
                raise ArtifactError(f"tensor {name} is missing")
    for name in stored:
        if name.rpartition(".")[0] in owners and name not in expected:
            raise ArtifactError(f"tensor {name} is not one that its site has")


def coverage_faults(sites: Sequence[QuantizationSite], config: Mapping[str, Any]) -> list[str]:
    """Where the sites of ``omega_config.json`` are not what its recipe quantizes of this policy.

    Linears are compared, since how they are grouped into sites may differ.

    Args:
        sites: of the policy.
        config: the content of the file.

    Returns:
        One line per kind of difference; empty if each linear that the recipe quantizes is in
        exactly one site, no other is in any, and the linears left in 16 bits are those listed.
    """
    recipe = Recipe.model_validate(config["recipe"])
    covered = [site for site in sites if recipe.scheme_of(site) is not None]
    planned = {name for site in covered for name in site.linears}
    counts = Counter(
        name for item in config["sites"] for name in SiteRecord.model_validate(item).site.linears
    )
    differences = {
        f"of {len(planned)} linears that the recipe quantizes are in no site": planned - {*counts},
        "linears of sites are not among those the recipe quantizes here": {*counts} - planned,
        "linears are in two sites": {name for name, count in counts.items() if count > 1},
        "linears differ from those that the recipe leaves in 16 bits": {
            *kept_linears(sites, recipe)
        }
        ^ {str(name) for name in config["kept"]},
    }
    return [
        f"{len(names)} {what}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in differences.items()
        if names
    ]
