"""Records what peft makes of small adapters: their files, and the weights after merging.

Runs in an environment with peft, never with this project:

    python record_lora.py OUT.safetensors

The file has, of every case of ``lora_cases.py``, ``CASE/adapter/NAME`` (the tensors that peft
saved), ``CASE/merged/NAME`` (those that ``merge_and_unload`` changed), and peft's
``adapter_config.json`` in the metadata.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
from lora_cases import BIASED, CASES, EMBEDDING, PREFIX, ROWS, WIDTH, WIDTHS, base_weights


def network() -> nn.Module:
    """The network that is adapted, with its weights."""
    root = nn.Module()
    for name, (outputs, inputs) in WIDTHS.items():
        _place(root, PREFIX + name, nn.Linear(inputs, outputs, bias=name in BIASED))
    _place(root, PREFIX + EMBEDDING, nn.Embedding(ROWS, WIDTH))
    weights = {name: torch.from_numpy(value) for name, value in base_weights().items()}
    root.load_state_dict(weights, strict=True)
    return root


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(last, module)


def train(model: nn.Module) -> None:
    """Move everything that is trained; matrices that start at zero would hide a wrong sum."""
    source = np.random.default_rng(12)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                moved = source.normal(0.0, 0.2, tuple(parameter.shape)).astype(np.float32)
                parameter.add_(torch.from_numpy(moved))


def record(case: str, folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of one case, and its configuration as peft wrote it."""
    adapted = get_peft_model(network(), LoraConfig(**CASES[case]))
    train(adapted)
    adapted.save_pretrained(folder)
    loaded: Any = PeftModel.from_pretrained(network(), folder)
    merged = loaded.merge_and_unload().state_dict()
    before = network().state_dict()
    found = {
        f"{case}/adapter/{name}": tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    found |= {
        f"{case}/merged/{name}": tensor.contiguous()
        for name, tensor in merged.items()
        if not torch.equal(tensor, before[name])
    }
    return found, (folder / "adapter_config.json").read_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    tensors: dict[str, torch.Tensor] = {}
    configurations: dict[str, str] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found, configurations[case] = record(case, Path(folder))
        tensors |= found
    save_file(tensors, out, metadata={"configurations": json.dumps(configurations)})


if __name__ == "__main__":
    main()
