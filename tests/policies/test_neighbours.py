"""Policies this version does not build: one message each, saying what it is and what reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omega_qvla.errors import PolicyError
from omega_qvla.policies.full_precision import stream_policy

# What NVIDIA's published directories say, by the configuration classes of Isaac-GR00T and LeRobot.
N1_6 = {
    "architectures": ["Gr00tN1d6"],
    "model_type": "Gr00tN1d6",
    "model_name": "nvidia/Eagle-Block2A-2B-v2",
    "backbone_model_type": "eagle",
    "max_state_dim": 128,
    "max_action_dim": 128,
    "action_horizon": 50,
    "use_alternate_vl_dit": True,
}
N1_7 = {
    "architectures": ["Gr00tN1d7"],
    "model_type": "Gr00tN1d7",
    "model_name": "nvidia/Cosmos-Reason2-2B",
    "backbone_model_type": "qwen",
    "max_state_dim": 132,
    "max_action_dim": 132,
    "action_horizon": 40,
}
# What LeRobot 0.6.1 writes for groot, shortened.
LEROBOT_N1_7 = {
    "type": "groot",
    "chunk_size": 40,
    "max_state_dim": 132,
    "max_action_dim": 132,
    "base_model_path": "nvidia/GR00T-N1.7-3B",
    "embodiment_tag": "new_embodiment",
    "tokenizer_assets_repo": None,
}


@pytest.mark.parametrize(
    ("config", "name", "reader"),
    [
        (
            N1_6,
            "GR00T N1.6, .*32 layers for 16",
            "N1.6 release reads it, and no release of LeRobot",
        ),
        (N1_7, "GR00T N1.7, .*Cosmos-Reason2", "LeRobot from 0.6.0 on: .*base_model_path"),
        ({"model_type": "Gr00tN1d7"}, "GR00T N1.7", "Isaac-GR00T's N1.7 release"),
        ({"architectures": ["Gr00tN1d6Mem"]}, "GR00T N1.6", "Isaac-GR00T"),
        ({"model_type": "gr00t_n1"}, "GR00T N1,", "Isaac-GR00T's N1 release"),
        (LEROBOT_N1_7, "LeRobot's groot of GR00T N1.7", "LeRobot from 0.6.0 on"),
        ({"type": "a_plugin"}, "type 'a_plugin'", "was not tried"),
        ({"type": 7}, "type 7,", "was not tried"),
    ],
)
def test_it_is_said_what_it_is_and_what_runs_it(
    config: dict[str, Any], name: str, reader: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(PolicyError, match=rf"{name}.*{reader}.*omega_qvla\.TorchPolicy") as raised:
        stream_policy(tmp_path)
    assert "validation error" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("smolvla", "SmolVLA is run by LeRobot's own code"),
        ("act", "ACT is run by LeRobot's own code"),
        ("pi0_fast", "trust_remote_code"),
        ("diffusion", "Diffusion Policy .* convolutions"),
    ],
)
def test_a_command_for_native_policies_says_what_becomes_of_lerobots_types(
    kind: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
    with pytest.raises(PolicyError, match=expected):
        stream_policy(tmp_path)
