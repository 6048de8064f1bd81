"""Write the README's results from the saved JSON, or check that they are up to date.

Usage: ``python tools/results_table.py [--check]``.  Everything between the two markers of README.md
is generated: no figure in it was typed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omega_qvla.report.table import Table, comparison_table, markdown, task_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PROVENANCE = ROOT / "src" / "omega_qvla" / "assets" / "tiny_pi05" / "provenance.json"
CONTROLS = ("blank", "shuffled", "swapped")
ADMISSION = (
    "The embedded policy in full precision on unseen seeds, with Wilson 95 % intervals: as it is, "
    "with black images, and with the instruction of a task of another scene (shuffled) or of the "
    "same scene (swapped). A task is admitted to the benchmark if full precision solves 80 % and "
    "the controls far less."
)
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


def admission_table(path: Path) -> Table:
    """Full-precision success of every trained task, its controls, and whether it was admitted."""
    content = json.loads(path.read_text("utf-8"))
    header = ("task", "instruction", "full precision", *CONTROLS, "admitted")
    rows = []
    for task, result in content["results"].items():
        rates = tuple(_rate(result.get(name)) for name in ("plain", *CONTROLS))
        verdict = "yes" if result["admitted"] else "no"
        rows.append((task, content["tasks"][task], *rates, verdict))
    return Table(header, tuple(rows))


def _rate(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "–"
    (solved, episodes), (low, high) = measured["success"], measured["ci95"]
    return f"{solved}/{episodes} [{100 * low:.0f}, {100 * high:.0f}]"


def generated() -> str:
    """The text between the markers."""
    parts: list[str] = []
    if PROVENANCE.exists():
        parts += [ADMISSION, "", markdown(admission_table(PROVENANCE))]
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
