"""What ``omega_config.json`` says of a quantized policy (docs/artifact.md)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from omega_qvla.policies.base import Policy, QuantizationSite
from omega_qvla.quantization.pipeline import Quantization, planned_sites
from omega_qvla.quantization.site import QuantizedSite
from omega_qvla.recipe import Recipe
from omega_qvla.runtime.memory import kept_linears, reference_parameters


@dataclass(frozen=True)
class SiteRecord:
    """What ``omega_config.json`` says about one quantized site."""

    site: QuantizationSite
    in_features: int
    splits: tuple[int, ...]
    activation_bits: int
    activation_scale: str
    activation_clip: float | None
    group: int | None
    proxy_loss: float | None
    note: str

    def dump(self) -> dict[str, Any]:
        return {
            "name": self.site.name,
            "linears": list(self.site.linears),
            "component": self.site.component,
            "per_step": self.site.per_step,
            "in_features": self.in_features,
            "splits": list(self.splits),
            "activation_bits": self.activation_bits,
            "activation_scale": self.activation_scale,
            **({} if self.activation_clip is None else {"activation_clip": self.activation_clip}),
            "group": self.group,
            "proxy_loss": self.proxy_loss,
            "note": self.note,
        }

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> SiteRecord:
        site = QuantizationSite(
            str(content["name"]),
            tuple(str(name) for name in content["linears"]),
            content["component"],
            bool(content["per_step"]),
        )
        group = content["group"]
        return cls(
            site=site,
            in_features=int(content["in_features"]),
            splits=tuple(int(width) for width in content["splits"]),
            activation_bits=int(content["activation_bits"]),
            activation_scale=str(content["activation_scale"]),
            activation_clip=content.get("activation_clip"),
            group=None if group is None else int(group),
            proxy_loss=content["proxy_loss"],
            note=str(content["note"]),
        )


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
        "sites": [
            SiteRecord(
                site=site.site,
                in_features=site.in_features,
                splits=site.splits,
                activation_bits=site.activations.bits,
                activation_scale=site.activations.scale,
                activation_clip=_searched_clip(recipe, site),
                group=site.weight.group,
                proxy_loss=_measured(site.proxy_loss),
                note=site.note,
            ).dump()
            for site in quantization.sites
        ],
        "kept": kept_linears(policy, recipe),
        "embedding": None
        if quantization.embedding is None
        else {"path": quantization.embedding.path, "bits": quantization.embedding.bits},
        "adaptive_norm": "keep" if quantization.step_table is None else "table",
        "reference_parameters": reference_parameters(policy),
    }


def coverage_faults(policy: Policy, config: Mapping[str, Any]) -> list[str]:
    """Where the sites of ``omega_config.json`` are not what its recipe quantizes of this policy.

    Linears are compared, since how they are grouped into sites may differ.

    Args:
        policy: the structure; its tensors do not matter.
        config: the content of the file.

    Returns:
        One line per kind of difference; empty if each linear that the recipe quantizes is in
        exactly one site, no other is in any, and the linears left in 16 bits are those listed.
    """
    recipe = Recipe.model_validate(config["recipe"])
    planned = {name for site in planned_sites(policy, recipe) for name in site.linears}
    counts = Counter(
        name for item in config["sites"] for name in SiteRecord.parse(item).site.linears
    )
    differences = {
        f"of {len(planned)} linears that the recipe quantizes are in no site": planned - {*counts},
        "linears of sites are not among those the recipe quantizes here": {*counts} - planned,
        "linears are in two sites": {name for name, count in counts.items() if count > 1},
        "linears differ from those that the recipe leaves in 16 bits": {
            *kept_linears(policy, recipe)
        }
        ^ {str(name) for name in config["kept"]},
    }
    return [
        f"{len(names)} {what}: {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in differences.items()
        if names
    ]


def _measured(loss: float | None) -> float | None:
    """A loss relative to an output that is always zero is none, and no JSON could hold it."""
    return loss if loss is not None and math.isfinite(loss) else None


def _searched_clip(recipe: Recipe, site: QuantizedSite) -> float | None:
    scheme = recipe.scheme_of(site.site)
    assert scheme is not None
    return site.activations.share if scheme.activations.clip == "search" else None
