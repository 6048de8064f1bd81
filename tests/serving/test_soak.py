"""The soak's three experiments in seconds; ``make soak`` runs them in full and judges times too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

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


def test_a_measurement_that_is_ended_takes_its_server_along(artifact: Path) -> None:
    """SIGTERM, as a job's time limit sends it."""
    pytest.importorskip("websockets", reason="the extra serve is not installed")
    script = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from serving_kit import served
with served(Path(sys.argv[2])) as server:
    print(server.pid, flush=True)
    time.sleep(300)
"""
    command = [sys.executable, "-c", script, str(KIT.parent), str(artifact)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as measurement:
        assert measurement.stdout is not None
        server = int(measurement.stdout.readline())
        os.kill(server, 0)  # it is there
        measurement.send_signal(signal.SIGTERM)
        assert measurement.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
