"""Chunks that continue one another, by LeRobot's own real-time chunking and by ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from guided_cases import GUIDED, SETTINGS, STEP_SETTINGS, Setting
from guided_parity import (
    FILE,
    TOLERANCE,
    chunk_difference,
    left_over_difference,
    loaded,
    step_difference,
)
from lerobot_cases import Case
from lerobot_golden import ROUNDING
from lerobot_parity import know_small_tower, read_record
from lerobot_records import write_records

pytestmark = pytest.mark.lerobot


@pytest.fixture(scope="module")
def records(lerobot_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases' checkpoints, and what LeRobot computes of them today."""
    folder = tmp_path_factory.mktemp("guided")
    write_records(lerobot_python, folder, [case.name for case in GUIDED])
    script = Path(__file__).with_name("record_guided.py")
    job = json.dumps({"records": str(folder), "out": str(folder / FILE.name)})
    subprocess.run([lerobot_python, script], input=job, text=True, check=True)
    return folder


@pytest.mark.parametrize("setting", STEP_SETTINGS, ids=lambda setting: setting.name)
def test_a_guided_denoising_step_is_lerobots(setting: Setting, records: Path) -> None:
    assert step_difference(read_record(records / FILE.name), setting) <= TOLERANCE


@pytest.mark.parametrize("case", GUIDED, ids=lambda case: case.name)
def test_a_chunk_continues_another_as_lerobots_does(
    case: Case, records: Path, table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    know_small_tower(monkeypatch)
    record = read_record(records / FILE.name)
    policy = loaded(records / case.name / "checkpoint", case)
    left_over = left_over_difference(policy, record, case)
    chunks = [chunk_difference(policy, record, case, setting) for setting in SETTINGS]
    name = f"guided {case.name}"
    table.append(f"{name:28} left-over {left_over:9.1e}  chunks {max(chunks):9.1e}")
    assert max(left_over, *chunks) <= TOLERANCE


def test_the_record_kept_with_the_tests_is_what_lerobot_computes_today(
    records: Path, request: pytest.FixtureRequest
) -> None:
    """To a rounding of float32: another processor sums in another order."""
    if request.config.getoption("--write-golden"):
        shutil.copyfile(records / FILE.name, FILE)
    today, kept = read_record(records / FILE.name), read_record(FILE)
    assert set(today) == set(kept)
    for key, array in today.items():
        assert np.allclose(array, kept[key], rtol=ROUNDING, atol=ROUNDING), key
