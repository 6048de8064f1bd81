"""The three files by which LeRobot takes an artifact for a policy (docs/lerobot.md).

``config.json`` says the type, which LeRobot's plug-in registers, and the shapes of what goes in and
comes out.  The pipelines rename, batch and move; normalizing and tokenizing is the policy's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omega_qvla.artifact.manifest import LEROBOT
from omega_qvla.policies.base import Policy
from omega_qvla.policies.lerobot_bridge.policy import IMAGE, STATE, LeRobotPolicy
from omega_qvla.policies.native import NativePolicy

TYPE = "omega_qvla"
"""What LeRobot calls these policies; the plug-in registers it."""

_DEVICE = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}


def lerobot_files(policy: Policy) -> dict[str, bytes]:
    """The files by name; none for a module of the user's own, which LeRobot cannot sample."""
    if isinstance(policy, NativePolicy):
        inputs, outputs = _native_features(policy)
    elif isinstance(policy, LeRobotPolicy):
        content = policy.network.content
        inputs, outputs = content["input_features"], content["output_features"]
    else:
        return {}
    config = {
        "type": TYPE,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "push_to_hub": False,
    }
    rename = {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}}
    batch = {"registry_name": "to_batch_processor", "config": {}}
    documents = (
        config,
        _pipeline("policy_preprocessor", [rename, batch, _DEVICE]),
        _pipeline("policy_postprocessor", [_DEVICE]),
    )
    return {
        name: (json.dumps(content, indent=2) + "\n").encode()
        for name, content in zip(LEROBOT, documents, strict=True)
    }


def _native_features(policy: NativePolicy) -> tuple[dict[str, Any], dict[str, Any]]:
    config = policy.config
    side = config.vision.image_size
    inputs = {IMAGE + name: _feature("VISUAL", (3, side, side)) for name in config.cameras}
    inputs[STATE] = _feature("STATE", (config.state_dim,))
    return inputs, {"action": _feature("ACTION", (config.robot_action_dim,))}


def _feature(kind: str, shape: Sequence[int]) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _pipeline(name: str, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": name, "steps": list(steps)}
