"""LeRobot's own code: whether it is there, whether it is a version that was tried, and its modules.

Nothing else in this project imports LeRobot.  Its policies are run as they are, so what matters is
not an interface but the very version whose modules were compared with.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omega_qvla.errors import ResourceError

TESTED = ("0.6.1",)
"""Versions of LeRobot that ``make test-lerobot`` was run with."""


def lerobot_version() -> str:
    """The version that is installed.

    Raises:
        ResourceError: none is, or one that was not tried.
    """
    tried = " or ".join(TESTED)
    try:
        found = version("lerobot")
    except PackageNotFoundError as error:
        raise ResourceError(
            "this policy is run by LeRobot's own code, which is not installed here: install "
            f"lerobot=={tried} beside omega-qvla, in Python 3.12 or later (docs/lerobot.md)"
        ) from error
    if found not in TESTED:
        raise ResourceError(
            f"LeRobot {found} is installed, but this version was tried with {tried} only: another "
            f"one may compute something else without a word. Install lerobot=={TESTED[-1]}"
        )
    return found


def lerobot(name: str) -> Any:
    """A module of LeRobot, by its name below ``lerobot``.

    Raises:
        ResourceError: LeRobot is not there, of another version, or lacks a package of its own.
    """
    lerobot_version()
    try:
        return import_module(f"lerobot.{name}")
    except ImportError as error:
        raise ResourceError(
            f"lerobot.{name} cannot be imported ({error}): install LeRobot with the extra of the "
            "policy, as in lerobot[smolvla]"
        ) from error
