"""Print the section of a version from CHANGELOG.md, as the notes of its release.

Usage: ``python tools/release_notes.py VERSION``.  Needs nothing installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parent.parent / "CHANGELOG.md"


def notes_of(version: str, changelog: str) -> str:
    """What stands below ``## [version]``, without the heading.

    Raises:
        ValueError: there is no such section, or nothing in it.
    """
    heading = rf"^## \[{re.escape(version)}\][^\n]*\n"
    found = re.search(heading + r"(.*?)(?=^## \[|\Z)", changelog, re.DOTALL | re.MULTILINE)
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md says nothing under '## [{version}]'")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    try:
        sys.stdout.write(notes_of(sys.argv[1], CHANGELOG.read_text("utf-8")))
    except (IndexError, ValueError) as error:
        sys.exit(f"release_notes.py: {error}")
