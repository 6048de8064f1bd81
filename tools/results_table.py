"""Write the README's results and docs/results.md from the saved JSON, or check them.

Usage: ``python tools/results_table.py [--check]``.  Everything between the two markers of README.md
and all of docs/results.md is generated: no figure in them was typed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.report.benchmark_table import (
    benchmark_tables,
    drift_table,
    error_table,
    unseen_table,
)
from omega_qvla.report.table import (
    Table,
    markdown,
    results_table,
    task_table,
)
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Row

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

BENCHMARK = "benchmark-v1.json"
BENCHMARK_TEXT = "`{}`, everything quantized (`--scope all`), the same unseen seeds in every cell:"
PAPER_SCOPE = (
    "`{}` open loop on held-out observations, eight noises each, backbone and action head only "
    "(`--scope paper`), the scope of the paper:"
)
DETAILS = """# Results of the benchmark

Written by `python tools/results_table.py` from
[`benchmarks/results/{name}`](../benchmarks/results/{name}); what is measured and how is in
[benchmark.md](benchmark.md), what the methods are in [methods.md](methods.md).

Recipes have other names than when they were measured: `omega-w4a4-static` was `omega-w4a4`,
`omega-w4a4-no-prior` was `omega2-w4a4`, and the default, `omega-w4a4`, was `omega3-w4a4`. The
files were renamed with them and nothing was run again.

Made with {library} on {machine}: `{command}`
"""
MANY = """## {policy} on 800 more observations

Open loop, from [`benchmarks/results/{name}`](../benchmarks/results/{name}): observations that full
precision acted on in other episodes, two noises each, the same calibration
(`benchmarks/many_observations.py --first-seed 600000`). No recipe was chosen on them.
"""
SUCCESSOR = """## `omega-w4a4`, {policy}, the same observations

Open loop, from [`benchmarks/results/{name}`](../benchmarks/results/{name}): observations, noises
and calibration of the rows above, which were measured while `omega-w4a4-no-prior` was the default.
Its episodes in the simulator are **not measured**.
"""
UNSEEN = """## What calibration did not see, {policy}

From [`benchmarks/results/{name}`](../benchmarks/results/{name}), made with `{command}`; what the
columns are is in [benchmark.md](benchmark.md#what-calibration-did-not-see).
"""
ABLATIONS = """## Ablations of `omega-w4a4-static`, {policy}, on 400 observations

From [`benchmarks/results/{name}`](../benchmarks/results/{name}), with seeds from 500,000 on.
`omega-w4a4-static` was the default when they were measured: it is what ratios are to.
"""


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


def rows_of(name: str) -> list[Row]:
    """The rows of a saved comparison."""
    return load_comparison(RESULTS / name).rows


def benchmark_section() -> list[str]:
    """The benchmark on one page, a table per policy."""
    parts: list[str] = []
    for name, table in benchmark_tables(rows_of(BENCHMARK)).items():
        parts += [BENCHMARK_TEXT.format(name.removeprefix("builtin:")), "", markdown(table)]
    link = f"[`benchmarks/results/{BENCHMARK}`](benchmarks/results/{BENCHMARK})"
    return [
        *parts,
        f"Data: {link}; intervals, paired tests, drift: [docs/results.md](docs/results.md).",
        "",
    ]


def readme_section() -> str:
    """The text between the README's markers."""
    parts = [ADMISSION, "", markdown(admission_table(POLICIES)), *benchmark_section()]
    for policy in POLICIES:
        name = f"{policy}-paper-scope.json"
        parts += [
            PAPER_SCOPE.format(policy),
            "",
            markdown(results_table(rows_of(name))),
        ]
        parts += [f"Data: [`benchmarks/results/{name}`](benchmarks/results/{name}).", ""]
    return "\n".join(parts)


def details() -> str:
    """docs/results.md: every row with its intervals."""
    found = load_comparison(RESULTS / BENCHMARK)
    run, rows = found.benchmark, found.rows
    assert run is not None
    parts = [DETAILS.format(name=BENCHMARK, **run.model_dump())]
    if run.missing:
        parts.append(f"**Not measured**: {'; '.join(run.missing)}.\n")
    for policy in POLICIES:
        kept = [row for row in rows if row.policy == f"builtin:{policy}"]
        parts += [f"## {policy}\n", markdown(results_table(kept))]
        parts += ["### Action error\n", markdown(error_table(kept))]
        parts += ["### Drift of the hand\n", markdown(drift_table(kept))]
        parts += ["### Successes per task\n", markdown(task_table(kept))]
    for policy in POLICIES:
        name = f"{policy}-default.json"
        parts += [SUCCESSOR.format(policy=policy, name=name)]
        parts += [markdown(error_table(rows_of(name)))]
    for policy in POLICIES:
        name = f"{policy}-unseen.json"
        found = load_comparison(RESULTS / name)
        assert found.unseen is not None
        parts += [UNSEEN.format(policy=policy, name=name, command=found.unseen.command)]
        parts += [markdown(unseen_table(found.rows))]
    for policy in POLICIES:
        for kind, text in (("many-observations", MANY), ("ablations", ABLATIONS)):
            name = f"{policy}-{kind}.json"
            parts += [text.format(policy=policy, name=name)]
            parts += [markdown(error_table(rows_of(name)))]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Rewrite or check; returns the exit status."""
    text = README.read_text("utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    wanted = {
        README: f"{before}{START}\n{readme_section()}{END}{after}",
        ROOT / "docs" / "results.md": details(),
    }
    stale = [path for path, content in wanted.items() if _read(path) != content]
    if arguments == ["--check"]:
        for path in stale:
            print(f"{path.name}: results are out of date; run python tools/results_table.py")
        return int(bool(stale))
    for path in stale:
        path.write_text(wanted[path], "utf-8")
    return 0


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
