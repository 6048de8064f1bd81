"""Write the tables of docs/kernels.md from the saved benchmarks, or check that they are those."""

from __future__ import annotations

import sys
from pathlib import Path

from omega_qvla.report.table import Table, kernel_table, latency_table, markdown, policy_table
from omega_qvla.results.reading import parse, read_bytes
from omega_qvla.results.speed import KernelBench, PolicyBench

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
LIMITED = "FBGEMM_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2"
"""Limits torch's libraries, as ``--kernel avx2`` limits ours."""
CHUNK = "omega-qvla bench policy --artifact OUT --threads 2"
TABLES = (
    (
        "kernels",
        "cpu-kernels.json",
        "omega-qvla bench kernels --threads 1 --rounds 9 --llama-cpp FOLDER",
    ),
    (
        "avx2",
        "cpu-kernels-avx2.json",
        f"{LIMITED} omega-qvla bench kernels --threads 1 --rounds 9 --kernel avx2 --sites pi0.5",
    ),
    (
        "latency",
        "cpu-kernels.json",
        "omega-qvla bench kernels --threads 1 --rounds 9 --llama-cpp FOLDER",
    ),
    (
        "chunk",
        "cpu-pi05-chunk.json",
        f"{CHUNK} --rounds 5 --policy random:pi05-libero",
    ),
    (
        "gr00t",
        "cpu-gr00t-chunk.json",
        f"{CHUNK} --rounds 3 --policy random:gr00t-n1.5-libero",
    ),
)
"""Name between the markers, results, and the command that made them."""


def table_of(name: str, found: KernelBench | PolicyBench) -> Table:
    """What stands between a table's markers."""
    if isinstance(found, PolicyBench):
        return policy_table(found.rows)
    return latency_table(found.contention) if name == "latency" else kernel_table(found.summary)


def block(name: str, command: str, found: KernelBench | PolicyBench) -> str:
    """The text between a table's markers."""
    machine = f"{found.machine}, torch {found.torch}"
    if name != "latency":
        machine += f", {found.threads} thread(s)"
    table = markdown(table_of(name, found))
    return (
        f"<!-- {name}:start -->\nMade by `{command}` on {machine}.\n\n{table}\n<!-- {name}:end -->"
    )


def rendered(text: str) -> str:
    """The document with its tables as the saved benchmarks have them."""
    for name, results, command in TABLES:
        kind, found = parse(read_bytes(RESULTS / results), results)
        assert isinstance(found, KernelBench | PolicyBench), kind
        start, end = text.index(f"<!-- {name}:start -->"), f"<!-- {name}:end -->"
        after = text.index(end) + len(end)
        text = text[:start] + block(name, command, found) + text[after:]
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
