"""Write the tables of docs/kernels.md from the saved benchmarks, or check that they are those."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from omega_qvla.report.table import Table, kernel_table, latency_table, markdown, policy_table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
LIMITED = "FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
"""Limits torch's libraries, as ``--kernel avx2`` limits ours."""
CHUNK = "omega-qvla bench policy --artifact OUT --threads 2"
TABLES: tuple[tuple[str, str, str, Callable[[dict], Table]], ...] = (
    (
        "kernels",
        "cpu-kernels.json",
        "omega-qvla bench kernels --rounds 9 --llama-cpp FOLDER",
        lambda document: kernel_table(document["summary"]),
    ),
    (
        "avx2",
        "cpu-kernels-avx2.json",
        f"{LIMITED} omega-qvla bench kernels --rounds 9 --kernel avx2 --sites pi0.5",
        lambda document: kernel_table(document["summary"]),
    ),
    (
        "latency",
        "cpu-kernels.json",
        "omega-qvla bench kernels --rounds 9 --llama-cpp FOLDER",
        lambda document: latency_table(document["contention"]),
    ),
    (
        "chunk",
        "cpu-pi05-chunk.json",
        f"{CHUNK} --rounds 5 --policy random:pi05-libero",
        lambda document: policy_table(document["rows"]),
    ),
    (
        "gr00t",
        "cpu-gr00t-chunk.json",
        f"{CHUNK} --rounds 3 --policy random:gr00t-n1.5-libero",
        lambda document: policy_table(document["rows"]),
    ),
)
"""Name between the markers, results, the command that made them, and the table."""


def block(name: str, command: str, table: Table, document: dict) -> str:
    """The text between a table's markers."""
    machine = f"{document['machine']}, torch {document['torch']}"
    if name != "latency":
        machine += f", {document['threads']} thread(s)"
    return (
        f"<!-- {name}:start -->\nMade by `{command}` on {machine}.\n\n{markdown(table)}\n"
        f"<!-- {name}:end -->"
    )


def rendered(text: str) -> str:
    """The document with its tables as the saved benchmarks have them."""
    for name, results, command, table in TABLES:
        document = json.loads((RESULTS / results).read_text("utf-8"))
        start, end = text.index(f"<!-- {name}:start -->"), f"<!-- {name}:end -->"
        after = text.index(end) + len(end)
        text = text[:start] + block(name, command, table(document), document) + text[after:]
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
