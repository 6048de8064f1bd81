"""The soak's three experiments in seconds; ``make soak`` runs them in full and judges times too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).parents[2] / "benchmarks" / "soak_serving.py"


def test_the_short_soak_finds_nothing(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    result = tmp_path / "soak.json"
    command = [sys.executable, str(KIT), "--artifact", str(artifact), "--short"]
    done = subprocess.run(
        [*command, "--out", str(result)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    document = json.loads(result.read_text())
    assert all(bar["passed"] for bar in document["bars"]) and len(document["bars"]) == 13
    assert document["parts"]["soak"]["canaries_differing"] == 0
    assert document["parts"]["slow_clients"]["closed"] == 200
