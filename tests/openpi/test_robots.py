"""The records of openpi's transforms that are kept with the tests, made anew."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "parity" / "golden" / "openpi_robots.safetensors"

pytestmark = pytest.mark.openpi


def test_the_records_of_robots_are_what_openpi_computes_today(
    openpi: tuple[Path, Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    clone, python = openpi
    sources = (clone / "src", clone / "packages" / "openpi-client" / "src", TESTS / "helpers")
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sources))}
    script, out = TESTS / "openpi" / "record_robots.py", tmp_path / "robots.safetensors"
    job = json.dumps({"out": str(out)})
    subprocess.run([python, script], input=job, text=True, check=True, env=around)
    if request.config.getoption("--write-openpi"):
        GOLDEN.write_bytes(out.read_bytes())
    with safe_open(out, framework="np") as made, safe_open(GOLDEN, framework="np") as kept:
        assert made.metadata() == kept.metadata()
        assert set(made.keys()) == set(kept.keys())
        for name in made.keys():  # noqa: SIM118 - not a mapping
            np.testing.assert_allclose(made.get_tensor(name), kept.get_tensor(name), rtol=1e-12)
