"""Write the tables of docs/kernels.md from the saved benchmarks, or check that they are those."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omega_qvla.report.table import Table, kernel_table, markdown, policy_table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    "kernels": "omega-qvla bench kernels --rounds 9",
    "chunk": "omega-qvla bench policy --policy random:pi05-libero --artifact OUT --threads 2",
}


def block(name: str, table: Table, document: dict) -> str:
    """The text between a table's markers."""
    machine = f"{document['machine']}, {document['threads']} thread(s), torch {document['torch']}"
    source = f"Made by `{COMMANDS[name]}` on {machine}."
    return f"<!-- {name}:start -->\n{source}\n\n{markdown(table)}\n<!-- {name}:end -->"


def rendered(text: str) -> str:
    """The document with both tables as the saved benchmarks have them."""
    kernels = json.loads((RESULTS / "cpu-kernels.json").read_text("utf-8"))
    chunk = json.loads((RESULTS / "cpu-pi05-chunk.json").read_text("utf-8"))
    for name, table, document in (
        ("kernels", kernel_table(kernels["summary"]), kernels),
        ("chunk", policy_table(chunk["rows"]), chunk),
    ):
        start, end = text.index(f"<!-- {name}:start -->"), f"<!-- {name}:end -->"
        after = text.index(end) + len(end)
        text = text[:start] + block(name, table, document) + text[after:]
    return text


if __name__ == "__main__":
    before = DOCUMENT.read_text("utf-8")
    after = rendered(before)
    if "--check" in sys.argv:
        if before != after:
            sys.exit(
                "docs/kernels.md is not what the saved benchmarks say: run tools/speed_table.py"
            )
    else:
        DOCUMENT.write_text(after, "utf-8")
