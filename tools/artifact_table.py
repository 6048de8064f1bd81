"""Write the tables of docs/artifact.md from the schema, or check that they are those."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omega_qvla.artifact.layout import EMBEDDING_KINDS, SITE_KINDS, Kind

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "artifact.md"
TABLES: tuple[tuple[str, str, Sequence[Kind]], ...] = (
    ("site", "name", SITE_KINDS),
    ("embedding", "PATH", EMBEDDING_KINDS),
)
"""Name between the markers, what stands before the kind, and the rows."""


def block(name: str, prefix: str, kinds: Sequence[Kind]) -> str:
    """The text between a table's markers."""
    rows = [
        f"| `{prefix}.{kind.name}` | {str(kind.dtype).removeprefix('torch.')} "
        f"[{', '.join(kind.shape)}] | {kind.stored} | {kind.meaning} |"
        for kind in kinds
    ]
    head = ["| tensor | dtype, shape | stored with | meaning |", "|---|---|---|---|"]
    return "\n".join([f"<!-- {name}:start -->", *head, *rows, f"<!-- {name}:end -->"])


def written(document: str) -> str:
    """The document with its tables as the schema has them."""
    for name, prefix, kinds in TABLES:
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, _, rest = document.partition(start)
        document = before + block(name, prefix, kinds) + rest.partition(end)[2]
    return document


def main() -> int:
    """Write, or with ``--check`` compare."""
    document = DOCUMENT.read_text("utf-8")
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(written(document), "utf-8")
        return 0
    if written(document) == document:
        return 0
    print(f"{DOCUMENT} differs from the schema: run python tools/artifact_table.py")
    return 1


if __name__ == "__main__":
    sys.exit(main())
