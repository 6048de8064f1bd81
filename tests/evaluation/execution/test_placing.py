"""Where a sweep runs unless the user says otherwise."""

from __future__ import annotations

import pytest

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.execution import placing
from omega_qvla.evaluation.execution.inline import InlineExecutor
from omega_qvla.evaluation.execution.placing import WORTH_PROCESSES, place

GIGABYTE = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores and 16 GB."""
    monkeypatch.setattr(placing, "available_cores", lambda: 8)
    monkeypatch.setattr(placing, "available_memory", lambda: 16 * GIGABYTE)


def processes(**changes: object) -> int:
    """How many worker processes are chosen."""
    settings = {"ray": None, "processes": None, "threads": 1, "policy_bytes": 0}
    settings |= {"episodes": WORTH_PROCESSES} | changes
    executor = place(**settings)  # type: ignore[arg-type]
    if isinstance(executor, InlineExecutor):
        return 1
    return int(executor.description.split()[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8),
        ({"threads": 4}, 2),
        ({"episodes": WORTH_PROCESSES - 1}, 1),
        ({"policy_bytes": GIGABYTE}, 3),  # three copies, the libraries and a simulator: 4.25 GB
        ({"simulators": 16}, 3),  # a quarter of a gigabyte each: 5 GB with the libraries
        ({"policy_bytes": 14 * GIGABYTE}, 1),
        ({"threads": 9}, 1),
        ({"processes": 3, "episodes": 1, "policy_bytes": 14 * GIGABYTE}, 3),
        ({"processes": 1}, 1),
    ],
)
def test_processes_follow_cores_memory_and_work(
    machine: None, changes: dict[str, object], expected: int
) -> None:
    assert processes(**changes) == expected


def test_ray_and_processes_exclude_each_other() -> None:
    with pytest.raises(ResourceError, match="leave `processes` out"):
        processes(ray="local", processes=2)
