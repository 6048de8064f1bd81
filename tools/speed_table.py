"""Write the speed tables of README.md and of the pages about kernels, or check them.

Usage: ``python tools/speed_table.py [--check]``.
"""

from __future__ import annotations

import sys

from generated import ROOT, with_block, write_or_check

from omega_qvla.report.table import (
    MISSING,
    Table,
    kernel_table,
    latency_table,
    markdown,
    policy_table,
)
from omega_qvla.results.reading import parse, read_bytes
from omega_qvla.results.speed import KernelBench, PolicyBench, PolicySpeed

README = ROOT / "README.md"
DOCUMENT = ROOT / "docs" / "kernels.md"
NOTE = ROOT / "docs" / "design-notes" / "2026-11-kernels.md"
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
PRECISIONS = {"fp32": "float32", "w4a4": "W4A4"}


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
    return f"Made by `{command}` on {machine}.\n\n{markdown(table_of(name, found))}\n"


def rendered(text: str) -> str:
    """The document with its tables as the saved benchmarks have them."""
    for name, results, command in TABLES:
        if f"<!-- {name}:start -->" not in text:
            continue
        kind, found = parse(read_bytes(RESULTS / results), results)
        assert isinstance(found, KernelBench | PolicyBench), kind
        text = with_block(text, name, block(name, command, found))
    return text


CHUNKS = {"pi0.5": "cpu-pi05-chunk.json", "GR00T N1.5": "cpu-gr00t-chunk.json"}


def readme_table() -> Table:
    """Two full-size policies, before and after: three rows, one number in a cell."""
    columns: list[PolicySpeed] = []
    names: list[str] = []
    for title, results in (
        ("pi0.5", "cpu-pi05-chunk.json"),
        ("GR00T N1.5", "cpu-gr00t-chunk.json"),
    ):
        kind, found = parse(read_bytes(RESULTS / results), results)
        assert isinstance(found, PolicyBench), kind
        columns += found.rows
        names += [f"{title}, {PRECISIONS[row.precision]}" for row in found.rows]
    return Table(
        ("", *names),
        (
            ("one action chunk, s", *(f"{row.total_ms / 1e3:.1f}" for row in columns)),
            ("peak memory, GB", *(_gigabytes(row.peak_rss_bytes, 1) for row in columns)),
            ("checkpoint, GB", *(_gigabytes(row.checkpoint_bytes, 2) for row in columns)),
        ),
        ("a full-precision checkpoint is counted in bfloat16, as it is published",),
    )


def _gigabytes(count: int | None, digits: int) -> str:
    return MISSING if count is None else f"{count / 1e9:.{digits}f}"


def main(arguments: list[str]) -> int:
    """Rewrite or check; returns the exit status."""
    wanted = {
        README: with_block(README.read_text("utf-8"), "speed", markdown(readme_table())),
        DOCUMENT: rendered(DOCUMENT.read_text("utf-8")),
        NOTE: rendered(NOTE.read_text("utf-8")),
    }
    return write_or_check(wanted, arguments, "speed_table.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
