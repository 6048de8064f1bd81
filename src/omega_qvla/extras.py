"""Packages that only a part of this library needs, and what to type where one is missing.

A package that is there but cannot be imported (its own requirement has another version, a system
library is missing) is a different fault from one that is not there, and is reported as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

from omega_qvla.errors import MissingPackageError

_DISTRIBUTION = "omega-qvla"


@contextmanager
def needing(purpose: str, extra: str) -> Iterator[None]:
    """Name what is missing if an import in the block fails.

    Args:
        purpose: what needs it, as the beginning of a sentence: ``"reading LeRobot datasets"``.
        extra: the group of optional dependencies that brings it.

    Raises:
        MissingPackageError: a package is not installed, or is and cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(_explanation(purpose, extra, error)) from error


def require(purpose: str, extra: str, *packages: str) -> None:
    """Refuse before any work what would need packages that are not installed.

    Raises:
        MissingPackageError: names those that are missing.
    """
    missing = [package for package in packages if not _installed(package)]
    if missing:
        raise MissingPackageError(_absent(purpose, extra, ", ".join(missing)))


def installation(extra: str) -> str:
    """The command that installs the packages of an extra, wherever this library came from."""
    return f"pip install {' '.join(repr(package) for package in _packages_of(extra))}"


def extras() -> dict[str, list[str]]:
    """What every extra for users brings, as it was required."""
    of_extra = re.compile(r"""\bextra\s*==\s*['"]([^'"]+)['"]""")
    found: dict[str, list[str]] = {}
    for line in requires(_DISTRIBUTION) or []:
        for name in of_extra.findall(line):
            if name != "dev":
                found.setdefault(name, []).append(line.partition(";")[0].strip())
    return found


def _explanation(purpose: str, extra: str, error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and not _installed(package):
        return _absent(purpose, extra, package)
    first = (str(error).strip().splitlines() or ["no details"])[0]
    return (
        f"{purpose} needs a package that is installed but cannot be imported: {first}. Install "
        "versions that fit each other, in an environment of their own if another package forbids "
        f"them; the extra {extra!r} wants {', '.join(_packages_of(extra))}"
    )


def _absent(purpose: str, extra: str, missing: str) -> str:
    return (
        f"{purpose} needs the package {missing}, which is not installed; "
        f"run: {installation(extra)} (the extra {extra!r})"
    )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _packages_of(extra: str) -> list[str]:
    try:
        listed = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        listed = []
    of_extra = re.compile(rf"""\bextra\s*==\s*['"]{re.escape(extra)}['"]""")
    found = [line.partition(";")[0].strip() for line in listed if of_extra.search(line)]
    return found or [f"{_DISTRIBUTION}[{extra}]"]
