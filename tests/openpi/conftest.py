"""Options of the comparison with openpi itself, and its table (``make test-openpi``)."""

from __future__ import annotations

from pathlib import Path

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
