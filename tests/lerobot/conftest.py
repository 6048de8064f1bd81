"""Options of the comparison with LeRobot itself, and its table (``make test-lerobot``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from comparison_table import pytest_terminal_summary, table

# It runs in LeRobot's environment, where this project is installed too (make test-lerobot).
collect_ignore = (
    [] if find_spec("lerobot") else ["test_torch_policies.py", "test_bridge.py", "test_plugin.py"]
)

__all__ = ["pytest_terminal_summary", "table"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lerobot", type=Path, help="python of an environment with LeRobot 0.6.1")
    parser.addoption("--lerobot-out", type=Path, help="where checkpoints and records are kept")
    parser.addoption(
        "--write-golden", action="store_true", help="replace the records kept with the tests"
    )


@pytest.fixture(scope="session")
def lerobot_python(request: pytest.FixtureRequest) -> Path:
    """The Python of the environment with LeRobot."""
    python = request.config.getoption("--lerobot", None)
    if python is None:
        pytest.skip("no environment with LeRobot was named: run make test-lerobot")
    return python
