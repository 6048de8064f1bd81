"""Shared by the artifact tests: an example to save, and the damage kit of the fuzz benchmark."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

KIT = Path(__file__).parents[2] / "benchmarks" / "fuzz_artifact.py"


@pytest.fixture(scope="session")
def kit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_artifact", KIT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_artifact"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example() -> dict[str, Any]:
    """Arguments of ``write_artifact``."""
    generator = torch.Generator().manual_seed(1)
    return {
        "config": {"family": "test", "nested": {"b": [1, 2.5, None], "a": "é"}},
        "tensors": {
            "site.weight_packed": torch.randint(
                -(2**31), 2**31 - 1, (6, 4), dtype=torch.int32, generator=generator
            ),
            "site.weight_scale": torch.rand(6, generator=generator),
            "site.weight_shape": torch.tensor([6, 31]),
            "site.transform": torch.rand(2, 4, 4, generator=generator).bfloat16(),
            "half": torch.rand(3, generator=generator).half(),
            "scalar": torch.tensor(2.0, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "bytes": torch.arange(5, dtype=torch.uint8),
            "flags": torch.tensor([True, False, True]),
        },
        "processor": {"stats.json": b"{}", "tokenizer.model": bytes(range(256))},
        "card": "# card\n",
    }


@pytest.fixture
def saved(kit: ModuleType, tmp_path: Path) -> Path:
    """A saved artifact with two tensor files."""
    kit.build(tmp_path / "saved")
    return tmp_path / "saved"
