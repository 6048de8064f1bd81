"""Options of the comparison with openpi itself, and its table (``make test-openpi``)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from comparison_table import pytest_terminal_summary, table

__all__ = ["pytest_terminal_summary", "table"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--openpi", type=Path, help="clone of openpi")
    parser.addoption("--openpi-python", type=Path, help="python of an environment for it")
    parser.addoption("--openpi-out", type=Path, help="where checkpoints and records are kept")
    parser.addoption(
        "--write-openpi", action="store_true", help="replace the checkpoints kept with the tests"
    )


class OpenPi(NamedTuple):
    """A clone of openpi, and the Python of an environment for it."""

    clone: Path
    python: Path


@pytest.fixture(scope="session")
def openpi(request: pytest.FixtureRequest) -> OpenPi:
    """Those that were named on the command line."""
    named = [request.config.getoption(f"--openpi{end}", None) for end in ("", "-python")]
    if None in named:
        pytest.skip("no clone of openpi was named: run make test-openpi")
    return OpenPi(*(path.absolute() for path in named))
