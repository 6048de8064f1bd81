"""How the suite is run (tests/helpers/suite.py), tried on suites of two tests."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

SKIPPED = """
import pytest

def test_expected():
    pytest.skip("the simulator is not installed, see docs")

def test_hidden():
    pytest.skip("{reason}")
"""


@pytest.mark.parametrize(
    ("reason", "status"), [("the simulator is not installed", 0), ("something else", 1)]
)
def test_a_skip_that_is_not_expected_fails_the_run(
    pytester: pytest.Pytester, reason: str, status: int
) -> None:
    pytester.makepyfile(SKIPPED.format(reason=reason))
    pytester.makefile(".txt", expected="the simulator is not installed\n")
    result = pytester.runpytest_inprocess("-p", "suite", "--expected-skips", "expected.txt")
    assert result.ret == status
    assert ("something else" in result.stdout.str()) == bool(status)


def test_files_with_long_tests_come_first(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_a="def test_quick(): pass",
        test_b="import pytest\ndef test_short(): pass\n@pytest.mark.long\ndef test_slow(): pass",
    )
    pytester.makeini("[pytest]\nmarkers = long: first")
    result = pytester.runpytest_inprocess("-p", "suite", "-v")
    shown = [line.split("::")[0] for line in result.stdout.lines if "PASSED" in line]
    assert shown == ["test_b.py", "test_b.py", "test_a.py"]
