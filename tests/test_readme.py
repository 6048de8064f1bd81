"""The Python of README.md, run as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.long

README = Path(__file__).parents[1] / "README.md"


def python_of(section: str) -> list[str]:
    """The Python blocks below a heading, in order."""
    text = README.read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.attn(x + memory)))


class Module(nn.Module):
    """What the snippet calls ``module``: ``llm`` and ``expert``."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 32))
        self.expert = Expert()


def test_the_blocks_are_the_two_that_are_run() -> None:
    native, own = python_of("In Python")
    assert "load_policy" in native and "TorchPolicy" in own


@pytest.mark.parametrize("number", [0, 1], ids=["native", "own module"])
def test_the_python_of_the_readme_runs_as_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    native, own = python_of("In Python")
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {
        "module": Module(),
        "observations": [
            {"tokens": torch.randint(16, (8,), generator=generator)} for _ in range(4)
        ],
    }
    exec(("import omega_qvla as oq\n" + own) if number else native, names)
    chunk = torch.as_tensor(names["chunk"])
    assert chunk.ndim == 2 and bool(torch.isfinite(chunk).all())
    assert (tmp_path / "out" / ("mine" if number else "tiny") / "manifest.json").is_file()
