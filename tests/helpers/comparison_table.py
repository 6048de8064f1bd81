"""A table of what was compared, printed at the end of a run."""

from __future__ import annotations

import pytest

ROWS = pytest.StashKey[list[str]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[str]:
    """Lines printed at the end."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for line in config.stash.get(ROWS, []):
        terminalreporter.write_line(line)
