"""How the suite is run: long tests first, and no skip that hides a check (``--expected-skips``)."""

from __future__ import annotations

from pathlib import Path

import pytest

UNEXPECTED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expected-skips",
        type=Path,
        metavar="FILE",
        help="fail where a test is skipped for a reason that starts like no line of FILE",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests go first: started last, one of them would keep a single worker busy."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Skips for other reasons than those expected make the run fail."""
    expected = session.config.getoption("--expected-skips")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if expected is None or reporter is None:
        return
    prefixes = tuple(line for line in expected.read_text("utf-8").splitlines() if line)
    found = [
        f"{path}:{line}: {reason}"
        for report in reporter.stats.get("skipped", ())
        for path, line, reason in [report.longrepr]
        if not reason.removeprefix("Skipped: ").startswith(prefixes)
    ]
    session.config.stash[UNEXPECTED] = sorted(set(found))
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Name the skips that were not expected."""
    found = config.stash.get(UNEXPECTED, [])
    if found:
        terminalreporter.section("skipped, and not expected to be")
        for line in found:
            terminalreporter.write_line(line)
