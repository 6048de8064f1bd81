"""pi05 and pi0 checkpoints that LeRobot writes, loaded and run by ours beside LeRobot itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from lerobot_cases import CASES, Case, Policy
from lerobot_golden import make_golden, same_golden
from lerobot_parity import HEADER, compare, know_small_tower, read_record
from lerobot_records import write_records

pytestmark = pytest.mark.lerobot


@pytest.fixture(scope="session")
def out(
    lerobot_python: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder with every case's checkpoint and record, written anew."""
    folder = request.config.getoption("--lerobot-out") or tmp_path_factory.mktemp("lerobot")
    write_records(lerobot_python, folder.resolve(), [case.name for case in CASES])
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ours_computes_what_lerobot_computes(
    case: Case, out: Path, table: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    know_small_tower(monkeypatch)
    found = compare(
        out / case.name / "checkpoint", read_record(out / case.name / "record.safetensors"), case
    )
    table.extend([found.row(case.name)] if table else [HEADER, found.row(case.name)])
    assert found.within_bounds(), found


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_the_records_kept_with_the_tests_are_what_lerobot_computes_today(
    policy: Policy, out: Path, request: pytest.FixtureRequest
) -> None:
    """Files equal, numbers to a rounding of float32: another processor sums in another order."""
    if request.config.getoption("--write-golden"):
        make_golden(out, policy)
    same_golden(out, policy)
