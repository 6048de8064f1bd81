"""Write the README's results from the saved JSON, or check that they are up to date.

Usage: ``python tools/results_table.py [--check]``.  Everything between the two markers of README.md
is generated: no figure in it was typed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.report.table import Table, comparison_table, markdown, task_table

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "src" / "omega_qvla" / "assets"
POLICIES = {"tiny-pi05": ASSETS / "tiny_pi05", "tiny-gr00t": ASSETS / "tiny_gr00t"}
CONTROLS = ("blank", "shuffled", "swapped")
ADMISSION = (
    "The embedded policies in full precision on unseen seeds, with Wilson 95 % intervals: as they "
    "are, with black images, and with the instruction of a task of another scene (shuffled) or of "
    "the same scene (swapped). A task is admitted to the benchmark if full precision solves 80 % "
    "and the controls far less."
)
START, END = "<!-- results:start -->", "<!-- results:end -->"

CLOSED_LOOP = (
    "`{}` in the simulator, everything quantized (`--scope all`), the same unseen seeds in every "
    "row:"
)
PAPER_SCOPE = (
    "`{}` open loop on held-out observations, backbone and action head only (`--scope paper`), "
    "the scope of the paper:"
)
SECTIONS = tuple(
    (f"{name}-{suffix}.json", text.format(name))
    for suffix, text in (("closed-loop", CLOSED_LOOP), ("paper-scope", PAPER_SCOPE))
    for name in POLICIES
)


def admission_table(policies: Mapping[str, Path]) -> Table:
    """Full-precision success of every trained task, its controls, and whether it was admitted."""
    header = ("policy", "task", "instruction", "full precision", *CONTROLS, "admitted")
    rows: list[tuple[str, ...]] = []
    for name, folder in policies.items():
        content = json.loads((folder / "provenance.json").read_text("utf-8"))
        for task, result in content["results"].items():
            rates = tuple(_rate(result.get(kind)) for kind in ("plain", *CONTROLS))
            verdict = "yes" if result["admitted"] else "no"
            rows.append((name, task, content["tasks"][task], *rates, verdict))
    return Table(header, tuple(rows))


def _rate(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "–"
    (solved, episodes), (low, high) = measured["success"], measured["ci95"]
    return f"{solved}/{episodes} [{100 * low:.0f}, {100 * high:.0f}]"


def generated() -> str:
    """The text between the markers."""
    parts = [ADMISSION, "", markdown(admission_table(POLICIES))]
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
