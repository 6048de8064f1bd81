"""Parts of documents that tools write: put them in place, or check that they are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def with_block(text: str, name: str, content: str) -> str:
    """A document with ``content`` between the markers ``<!-- name:start -->`` and ``…:end -->``."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content.strip()}\n{end}{after}"


def write_or_check(wanted: Mapping[Path, str], arguments: list[str], tool: str) -> int:
    """Write what differs, or with ``--check`` name it; returns the exit status."""
    stale = [
        path
        for path, content in wanted.items()
        if not path.exists() or path.read_text("utf-8") != content
    ]
    for path in stale:
        if arguments == ["--check"]:
            print(f"{path.relative_to(ROOT)} is out of date; run python tools/{tool}")
        else:
            path.write_text(wanted[path], "utf-8")
    return int(arguments == ["--check"] and bool(stale))
