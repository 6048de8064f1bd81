"""Write the README's results from the saved JSON, or check that they are up to date.

Usage: ``python tools/results_table.py [--check]``.  Everything between the two markers of README.md
is generated: no figure in it was typed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omega_qvla.report.table import comparison_table, markdown, task_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results:start -->", "<!-- results:end -->"

SECTIONS = (
    (
        "tiny-pi05-closed-loop.json",
        "The embedded policy in the simulator, everything quantized (`--scope all`), the same "
        "unseen seeds in every row:",
    ),
    (
        "tiny-pi05-paper-scope.json",
        "Open loop on held-out observations, backbone and action head only (`--scope paper`), "
        "the scope of the paper:",
    ),
)


def generated() -> str:
    """The text between the markers."""
    parts: list[str] = []
    for name, introduction in SECTIONS:
        path = RESULTS / name
        if not path.exists():
            continue
        parts += [introduction, "", markdown(comparison_table(path))]
        if task_table(path).header[2:]:
            parts += ["Successes per task:", "", markdown(task_table(path))]
        parts += [f"Data: [`benchmarks/results/{name}`](benchmarks/results/{name}).", ""]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Rewrite or check; returns the exit status."""
    text = README.read_text("utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    updated = f"{before}{START}\n{generated()}{END}{after}"
    if arguments == ["--check"]:
        if updated != text:
            print("README.md: results are out of date; run python tools/results_table.py")
        return int(updated != text)
    README.write_text(updated, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
