"""All datasets of ``dataset_cases.py``, written now by LeRobot and read by both.

Needs an environment with LeRobot 0.6.1 (``make test-lerobot``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from lerobot_rows import compare_rows, row_count

CAMERAS = ("base", "wrist")
SCRIPT = Path(__file__).parent / "dataset_cases.py"
NAMES = re.findall(r'^    "([\w-]+)": Case\(', SCRIPT.read_text(), flags=re.MULTILINE)

REFUSED = {"h264-10-bit": "10 bits per channel", "hevc-10-bit": "10 bits per channel"}
"""Cases that are refused whole, and the words that say why."""

FARTHER = {"first-pts-2-early-rows": "the nearest is at 0.200 s"}
"""LeRobot was given a tolerance of more than half a row period; this library keeps to that."""

pytestmark = pytest.mark.lerobot


@pytest.fixture(scope="module")
def datasets(lerobot_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets")
    write_datasets(lerobot_python, folder)
    return folder


def write_datasets(python: Path, folder: Path, cases: Sequence[str] = ()) -> None:
    """The cases, all by default, with what LeRobot reads of them."""
    around = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    job = json.dumps({"target": str(folder), "cases": list(cases)})
    subprocess.run([str(python), str(SCRIPT)], check=True, env=around, input=job, text=True)


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("order", ["ascending", "descending", "drawn"])
def test_every_row_is_identical_or_refused_with_the_reason(
    datasets: Path, case: str, order: str
) -> None:
    count = row_count(datasets / case)
    numbers = {
        "ascending": np.arange(count),
        "descending": np.arange(count)[::-1],
        "drawn": np.random.default_rng(0).permutation(count),
    }[order]
    found = compare_rows(datasets / case, CAMERAS, numbers)
    assert not found.different
    if case in REFUSED:
        assert not found.identical and not found.extra
        assert all(REFUSED[case] in reason for reason in found.reasons)
        return
    reasons = [reason for reason in found.reasons if FARTHER.get(case, "never") in reason]
    assert len(found.missing) == len(reasons)
    assert found.displaced >= len(found.extra)
    assert found.identical
