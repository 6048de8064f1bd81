"""The adapters that peft's own sums are recorded of: a small network, and what is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

PREFIX = "model."
"""Before every name of the network, as LeRobot's policies have it."""

WIDTHS: dict[str, tuple[int, int]] = {
    "expert.layers.0.self_attn.q_proj": (16, 12),
    "expert.layers.0.self_attn.v_proj": (8, 12),
    "expert.layers.1.self_attn.q_proj": (16, 12),
    "expert.layers.1.self_attn.v_proj": (8, 12),
    "tower.layers.0.self_attn.q_proj": (10, 10),
    "action_in_proj": (12, 6),
    "action_out_proj": (6, 12),
}
"""Linears: outputs and inputs; the last two have a bias."""

EMBEDDING, ROWS, WIDTH = "language_model.embed_tokens", 20, 12
BIASED = ("action_in_proj", "action_out_proj")

_EXPERT = r"(.*\.expert\..*\.self_attn\.(q|v)_proj|model\.(state_proj|action_in_proj))"

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": _EXPERT},
    "root of the rank": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": _EXPERT},
    "ranks by pattern": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.0.*q_proj": 2, "v_proj": 1},
        "alpha_pattern": {"q_proj": 7, r"tower\..*": 9},
    },
    "some excluded": {
        "r": 2,
        "target_modules": ["q_proj", "action_in_proj"],
        "exclude_modules": r".*tower.*",
    },
    "some trained whole": {
        "r": 2,
        "target_modules": ["q_proj", "action_out_proj"],
        "modules_to_save": ["action_out_proj"],
    },
    "lengths of rows": {"r": 2, "use_dora": True, "target_modules": _EXPERT},
    "biases of the trained": {"r": 2, "bias": "lora_only", "target_modules": _EXPERT},
    "all biases": {"r": 2, "bias": "all", "target_modules": _EXPERT},
    "a bias of its own": {"r": 2, "lora_bias": True, "target_modules": ["action_in_proj"]},
    "the embedding": {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
    "started from normal": {"r": 2, "init_lora_weights": "gaussian", "target_modules": _EXPERT},
}
"""What peft's ``LoraConfig`` gets, by what is special about it."""


def base_weights() -> dict[str, np.ndarray]:
    """The network before training, float32, under its names."""
    source = np.random.default_rng(11)
    drawn = {f"{name}.weight": source.normal(0.0, 0.3, shape) for name, shape in WIDTHS.items()}
    drawn |= {f"{name}.bias": source.normal(0.0, 0.3, WIDTHS[name][0]) for name in BIASED}
    drawn[f"{EMBEDDING}.weight"] = source.normal(0.0, 0.3, (ROWS, WIDTH))
    return {PREFIX + name: value.astype(np.float32) for name, value in drawn.items()}


_LEROBOT = r"(.*\.gemma_expert\..*\.self_attn\.(q|v)_proj|model\.(action_in_proj|action_out_proj))"
"""What LeRobot adapts of pi05 by default, its names of pi0 left out."""

POLICY_ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 4, "target_modules": _LEROBOT},
    "patterns": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": _LEROBOT,
        "rank_pattern": {"gemma_expert.*q_proj": 2},
        "alpha_pattern": {"v_proj": 2},
    },
    "dora": {"r": 4, "use_dora": True, "target_modules": _LEROBOT},
    "everywhere": {
        "r": 2,
        "target_modules": ["q_proj", "fc1", "up_proj", "time_mlp_in"],
        "modules_to_save": ["action_out_proj"],
    },
    "embedding": {"r": 2, "target_modules": r".*language_model\.embed_tokens"},
}
"""Adapters to a whole pi05, by the names of their directories."""
