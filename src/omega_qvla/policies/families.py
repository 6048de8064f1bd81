"""The families of policies that this version builds: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module

from omega_qvla.errors import PolicyError
from omega_qvla.policies.family import Family

FOLDERS = (
    "pi05",
    "pi0",
    "gr00t_n15",
)
"""Folders beside this file; each has a ``family.py`` with its ``FAMILY``."""


@cache
def families() -> Mapping[str, Family]:
    """Every family by its name, in the order of the folders."""
    modules = (import_module(f"omega_qvla.policies.{folder}.family") for folder in FOLDERS)
    return {module.FAMILY.name: module.FAMILY for module in modules}


def family_of(name: str) -> Family:
    """One family.

    Raises:
        PolicyError: this version has none of that name.
    """
    if name not in families():
        raise PolicyError(
            f"this version cannot rebuild policies of family {name!r}, only of "
            f"{', '.join(families())}"
        )
    return families()[name]


def titles() -> str:
    """What this version builds, for sentences."""
    *most, last = (family.title for family in families().values())
    return f"{', '.join(most)} and {last}"
