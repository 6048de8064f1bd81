"""Checkpoints that openpi's JAX trainer saves, loaded and run by ours beside openpi itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from openpi_cases import CASES, GOLDEN, STEP, Case
from openpi_parity import HEADER, compare, read_record

pytestmark = pytest.mark.openpi

RECORD = Path(__file__).parent / "record.py"
ROUNDING = 2e-6


@pytest.fixture(scope="session")
def out(
    openpi: tuple[Path, Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder with every case's checkpoint and record, written anew."""
    clone, python = openpi
    folder = request.config.getoption("--openpi-out") or tmp_path_factory.mktemp("openpi")
    command = [str(python), str(RECORD), str(clone), str(folder.resolve())]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ours_computes_what_openpi_computes(case: Case, out: Path, table: list[str]) -> None:
    found = compare(out / case.name, case)
    table.extend([found.row(case.name)] if table else [HEADER, found.row(case.name)])
    assert found.within_bounds(), found


@pytest.mark.parametrize("case", [case for case in CASES if case.golden], ids=lambda c: c.name)
def test_the_checkpoints_kept_with_the_tests_are_what_openpi_saves_today(
    case: Case, out: Path, request: pytest.FixtureRequest
) -> None:
    """Numbers to a rounding of float32: another processor sums in another order."""
    if request.config.getoption("--write-openpi"):
        keep(out / case.name, GOLDEN / case.name)
    now, kept = read_record(out / case.name), read_record(GOLDEN / case.name)
    assert set(now) == set(kept)
    for name, array in now.items():
        assert np.allclose(array, kept[name], rtol=ROUNDING, atol=ROUNDING), name


def keep(written: Path, kept: Path) -> None:
    """Replace a golden case: what inference needs of the step, and the record."""
    shutil.rmtree(kept, ignore_errors=True)
    unneeded = shutil.ignore_patterns("train_state")
    shutil.copytree(written / str(STEP), kept / str(STEP), ignore=unneeded)
    for name in ("record.safetensors", "training.json"):
        shutil.copy(written / name, kept / name)
