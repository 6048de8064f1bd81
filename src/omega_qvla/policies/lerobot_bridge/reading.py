"""A policy directory of LeRobot's, read by LeRobot and checked.

LeRobot goes on with random weights where a file does not fit (its pi0 prints a warning), so every
tensor of the module is held against the file afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from omega_qvla.checkpoints.files import contained_file, read_json, refuse_unsafe
from omega_qvla.checkpoints.lora import has_adapter
from omega_qvla.errors import OmegaError, PolicyError
from omega_qvla.policies.lerobot_bridge.building import build_random, configuration
from omega_qvla.policies.lerobot_bridge.kinds import UNSUITED, kind_of
from omega_qvla.policies.lerobot_bridge.library import lerobot
from omega_qvla.policies.lerobot_bridge.pipelines import read_pipelines
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy, Network

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_lerobot(directory: Path) -> LeRobotPolicy:
    """The policy in a directory that LeRobot has written.

    Raises:
        PolicyError: of a type that is not run here, or damaged; says in what.
        ResourceError: LeRobot is not there, of another version, or cannot fetch what it needs.
    """
    content = read_json(directory, CONFIG)
    name = str(content.get("type"))
    if name in UNSUITED:
        raise PolicyError(_unsuited(name, content))
    kind = kind_of(name)
    refuse_unsafe(directory)
    if has_adapter(directory):
        raise PolicyError(
            f"{directory} is an adapter of peft: merge it (merge_and_unload) and save the policy "
            "with LeRobot, then quantize that"
        )
    pipelines = read_pipelines(directory, name)
    module = _module(directory, name, content)
    _require_loaded(module, contained_file(directory, WEIGHTS))
    backbones = kind.backbones(module)
    return LeRobotPolicy.of(Network(name, module, content, backbones), pipelines)


def _module(directory: Path, name: str, content: Mapping[str, Any]) -> Any:
    config = configuration(content)
    made_by = lerobot("policies.factory").get_policy_class(name)
    try:
        with redirect_stdout(StringIO()):
            module = made_by.from_pretrained(str(directory), config=config, strict=True)
    except OmegaError:
        raise
    except Exception as error:
        raise PolicyError(
            f"LeRobot cannot read {directory}: {type(error).__name__}: {error}"
        ) from error
    return module.eval().requires_grad_(False)


def _require_loaded(module: nn.Module, weights: Path) -> None:
    """Every tensor of the module has its values from the file."""
    state = {n: t for n, t in module.state_dict().items() if isinstance(t, Tensor)}
    try:
        with safe_open(str(weights), framework="pt") as file:
            names = set(file.keys())
            found: dict[int, str] = {}
            for name, tensor in state.items():
                stored = next((n for n in _spellings(name) if n in names), None)
                if stored is None:
                    continue
                if not torch.equal(file.get_tensor(stored).to(tensor.dtype), tensor):
                    raise PolicyError(f"LeRobot has not taken {name!r} from {weights}")
                found[tensor.data_ptr()] = name
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{weights} is damaged: {error}") from error
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in found]
    if missing:
        raise PolicyError(
            f"{weights} has no values for {len(missing)} tensors of the policy, which LeRobot "
            f"leaves random: {', '.join(missing[:3])}"
        )


def _spellings(name: str) -> tuple[str, ...]:
    """Names that LeRobot's files have for a tensor: with and without the policy's own prefix."""
    return name, name.removeprefix("model."), f"model.{name}"


def _unsuited(name: str, content: Mapping[str, Any]) -> str:
    module = build_random(name, content)  # these try themselves out while they are built
    total = sum(p.numel() for p in module.parameters())
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    share = sum(linear.weight.numel() for linear in linears) / total
    return (
        f"{UNSUITED[name]} (LeRobot's {name}) is not quantized: {share:.1%} of its weights are in "
        f"linears, which is what is quantized here; the rest are mostly convolutions"
    )
