"""Options of the comparison with openpi itself, and its table (``make test-openpi``)."""

from __future__ import annotations

from pathlib import Path

import pytest

ROWS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--openpi", type=Path, help="clone of openpi")
    parser.addoption("--openpi-python", type=Path, help="python of an environment for it")
    parser.addoption("--openpi-out", type=Path, help="where checkpoints and records are kept")
    parser.addoption(
        "--write-openpi", action="store_true", help="replace the checkpoints kept with the tests"
    )


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[str]:
    """Lines printed at the end."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(ROWS, []):
        terminalreporter.write_line(line)
