"""The model card (``README.md``) that goes into every artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from omega_qvla.recipe import Recipe


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown text saying what the artifact is, how it was made and how to load it."""
    recipe = config["recipe"]
    left = Recipe.model_validate(recipe).left_in_16_bits
    sites = Counter(site["component"] for site in config["sites"])
    lines = [
        "# Quantized vision-language-action policy",
        "",
        f"- policy family: `{config['policy']['family']}`",
        f"- recipe: `{recipe['name']}` ({recipe['description']})",
        f"- recipe hash: `{config['recipe_hash']}`",
        *([f"- in 16 bits: {', '.join(left)}"] if left else []),
        f"- calibrated on {config['calibration']['observations']} observations, fingerprint "
        f"`{config['calibration']['fingerprint']}`",
        *(f"- calibration: {text}" for text in config["calibration"].get("warnings", ())),
        f"- made by omega-qvla {config['library_version']}",
        "",
        "| part | quantized sites |",
        "|---|---|",
        *(f"| {component} | {count} |" for component, count in sorted(sites.items())),
        "",
        "Token embedding: "
        + ("unquantized" if config["embedding"] is None else "int8, one scale per row")
        + ". Adaptive norms: "
        + ("a table over flow time." if config["adaptive_norm"] == "table" else "unchanged."),
        "",
        "```python",
        "import omega_qvla",
        "",
        'policy = omega_qvla.load("this/directory")',
        "chunk = policy.sample_actions(observation)",
        "```",
        "",
        "Check every byte with `omega-qvla verify DIR`.",
        "",
    ]
    return "\n".join(lines)
