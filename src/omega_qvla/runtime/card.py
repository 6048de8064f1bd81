"""The model card (``README.md``) that goes into every artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from omega_qvla.recipe import Recipe


def _loading(policy: Mapping[str, Any]) -> list[str]:
    """Python that loads the policy; a module of the user's own has to be given again."""
    if policy["family"] != "torch":
        return ["import omega_qvla", "", 'policy = omega_qvla.load("this/directory")']
    settings = policy["config"]
    named = [
        f"    {key}={value!r},"
        for key in ("backbone", "action_head", "steps", "step_module", "noise_shape")
        if (value := settings[key]) is not None
    ]
    return [
        "import omega_qvla",
        "",
        "# module: the network this was made from, built by your own code; any weights will do.",
        "# sample(module, observation, noise, clock): runs it once.",
        "structure = omega_qvla.TorchPolicy(",
        "    module,",
        "    sample=sample,",
        *named,
        ")",
        'policy = omega_qvla.load("this/directory", policy=structure)',
    ]


def _embedding(config: Mapping[str, Any]) -> str:
    if config["embedding"] is None:
        return "unquantized"
    if config["recipe"]["embedding_bits"] == 4:
        return "4 bits, one scale per 64 columns"
    return "8 bits, one scale per row"


def model_card(config: Mapping[str, Any]) -> str:
    """Markdown text saying what the artifact is, how it was made and how to load it."""
    recipe = config["recipe"]
    left = Recipe.model_validate(recipe).left_in_16_bits
    decisions = config["policy"].get("decisions", {})
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
        *(f"- {question}: {answer}" for question, answer in decisions.items()),
        "",
        "| part | quantized sites |",
        "|---|---|",
        *(f"| {component} | {count} |" for component, count in sorted(sites.items())),
        "",
        "Token embedding: "
        + _embedding(config)
        + ". Adaptive norms: "
        + ("a table over flow time." if config["adaptive_norm"] == "table" else "unchanged."),
        "",
        "```python",
        *_loading(config["policy"]),
        "chunk = policy.sample_actions(observation)",
        "```",
        "",
        "Check every byte with `omega-qvla verify DIR`.",
        "",
    ]
    return "\n".join(lines)
