"""README.md: its commands and its Python, run as they are written there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT, blocks, commands, run, section, serving
from torch import Tensor, nn

pytestmark = pytest.mark.long

THREE = "Your checkpoint in three commands"


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


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_fits_on_three_screens() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 220


def test_three_commands_and_openpis_client_get_actions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("openpi_client", reason="the client of openpi is not installed")
    quantize, inspect, serve = commands(section("README.md", THREE))
    run(quantize)
    run(inspect)
    (client,) = blocks(section("README.md", THREE), "python")
    names: dict[str, Any] = {}
    with serving(serve) as port:
        exec(client.replace("8000", str(port)), names)
    assert names["reply"]["actions"].shape == (10, 4)
    assert "omega-w4a4" in capsys.readouterr().out


def test_the_python_of_a_native_policy_runs(tmp_path: Path) -> None:
    (code,) = blocks(section("README.md", "In Python"), "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["chunk"].shape == (10, 4) and torch.isfinite(torch.tensor(names["chunk"])).all()
    assert (tmp_path / "out/tiny/manifest.json").is_file()


def test_the_python_of_a_module_of_ones_own_runs(tmp_path: Path) -> None:
    (code,) = blocks(section("README.md", "A module of your own"), "python")
    generator = torch.Generator().manual_seed(0)
    observations = [{"tokens": torch.randint(16, (8,), generator=generator)} for _ in range(4)]
    names: dict[str, Any] = {"module": Module(), "observations": observations}
    exec(code, names)
    chunk = torch.as_tensor(names["chunk"])
    assert chunk.shape == (8, 32) and bool(torch.isfinite(chunk).all())
    assert (tmp_path / "out/mine/manifest.json").is_file()
