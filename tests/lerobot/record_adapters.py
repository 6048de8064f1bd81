"""Saves LoRA adapters to a recorded pi05 with LeRobot and peft, and records what LeRobot computes.

Runs in an environment with LeRobot, never with this project.  The job is JSON on standard input:
``{"records": FOLDER}``, where ``record.py`` has put its cases.  Every adapter becomes two folders
beside them, ``adapter-NAME`` and ``adapter-NAME-merged``, each with ``checkpoint/`` and
``record.safetensors``; what the network is shown is that of the base's case.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from lerobot_cases import ACTION_WIDTH, CASES, noise, uniform
from lora_cases import POLICY_ADAPTERS
from record import LeRobot, batch_of, pipelines_of, settings

BASE = CASES[0]


def trained(lerobot: LeRobot, base: Path, adapter: dict[str, Any]) -> Any:
    """The base with an adapter whose values are noise; zeros would hide a wrong sum."""
    policy = lerobot.model.PI05Policy.from_pretrained(str(base), config=settings(lerobot, BASE))
    policy.config.pretrained_path = str(base)
    wrapped = policy.wrap_with_peft(peft_config=LoraConfig(**adapter))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                drawn = 0.2 * uniform(f"adapter {name}", tuple(parameter.shape))
                parameter.add_(torch.from_numpy(drawn).to(parameter.dtype))
    return wrapped


def save(wrapped: Any, base: Path, checkpoint: Path) -> None:
    """As ``lerobot-train --peft`` saves a fine-tune; the pipelines are the base's."""
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    wrapped.save_pretrained(checkpoint)
    wrapped.config.save_pretrained(checkpoint)
    copy_pipelines(base, checkpoint)


def copy_pipelines(base: Path, checkpoint: Path) -> None:
    for path in base.glob("policy_*"):
        shutil.copy(path, checkpoint / path.name)


def load(lerobot: LeRobot, checkpoint: Path) -> Any:
    """As ``make_policy`` loads it: the base's weights, then the adapter."""
    adapter = PeftConfig.from_pretrained(str(checkpoint))
    base = lerobot.model.PI05Policy.from_pretrained(
        adapter.base_model_name_or_path, config=settings(lerobot, BASE)
    )
    return PeftModel.from_pretrained(base, str(checkpoint), config=adapter).eval()


def record(policy: Any, records: Path, directory: Path) -> None:
    """One chunk of each observation, normalized and in the robot's units."""
    shown = load_file(records / BASE.name / "inputs")
    with torch.no_grad():
        chunk = policy.model.sample_actions(
            list(shown["pixels"].unbind(1)),
            list(shown["cameras"].unbind(1)),
            shown["tokens"],
            shown["mask"],
            noise=torch.from_numpy(noise()),
        )[..., :ACTION_WIDTH]
    before, after = pipelines_of(directory / "checkpoint")
    before(batch_of(BASE))
    found = {**shown, "chunk": chunk, "actions": after(chunk.clone())}
    tensors = {key: value.contiguous() for key, value in found.items()}
    save_file(tensors, directory / "record.safetensors")


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    records = Path(job["records"])
    lerobot = LeRobot(records / "tokenizer", "pi05")
    base = records / BASE.name / "checkpoint"
    for name, adapter in POLICY_ADAPTERS.items():
        apart, whole = records / f"adapter-{name}", records / f"adapter-{name}-merged"
        save(trained(lerobot, base, adapter), base, apart / "checkpoint")
        policy = load(lerobot, apart / "checkpoint")
        record(policy.get_base_model(), records, apart)
        shutil.rmtree(whole, ignore_errors=True)
        merged = policy.merge_and_unload()
        merged.config.use_peft = True  # as LeRobot leaves it
        merged.save_pretrained(whole / "checkpoint")
        copy_pipelines(base, whole / "checkpoint")
        record(merged, records, whole)
        print(f"adapter {name}: apart and merged", flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
