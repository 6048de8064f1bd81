"""Write the README's results and docs/results.md from the saved JSON, or check them.

Usage: ``python tools/results_table.py [--check]``.  The eight rows of README.md and all of
docs/results.md are generated: no figure in them was typed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated import ROOT, with_block, write_or_check

from omega_qvla.report.benchmark_table import (
    benchmark_tables,
    drift_table,
    error_table,
    unseen_table,
)
from omega_qvla.report.table import (
    MISSING,
    Table,
    error_text,
    markdown,
    results_table,
    task_table,
)
from omega_qvla.results.reading import load_comparison
from omega_qvla.results.rows import Row

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
README_POLICY, README_OUTLIERS = "builtin:tiny-pi05", "stress:30"
README_RECIPES = (
    "fp32",
    "rtn",
    "gptq",
    "smoothquant",
    "quarot",
    "duquant",
    "foldquant",
    "omega-w4a4-no-prior",
)
README_HEADER = (
    "recipe",
    "bits per weight",
    "checkpoint, MB",
    "success, %",
    "success with outliers, %",
    "action error with outliers",
)

BENCHMARK = "benchmark-v1.json"
BENCHMARK_TEXT = "`{}`, everything quantized (`--scope all`), the same unseen seeds in every cell:"
PAPER_SCOPE = (
    "`{}` open loop on held-out observations, eight noises each, backbone and action head only "
    "(`--scope paper`), the scope of the paper, from "
    "[`benchmarks/results/{name}`](../benchmarks/results/{name}):"
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


def readme_table() -> Table:
    """Eight recipes, plain and with outliers, one number in a cell."""
    rows = [row for row in rows_of(BENCHMARK) if row.policy == README_POLICY]
    cells = {(row.recipe, row.condition): row for row in rows}
    return Table(
        README_HEADER,
        tuple(
            _readme_row(cells[name, "plain"], cells.get((name, README_OUTLIERS)))
            for name in README_RECIPES
        ),
    )


def _readme_row(plain: Row, outliers: Row | None) -> tuple[str, ...]:
    bits, size = plain.bits_per_weight, plain.checkpoint_bytes
    return (
        f"`{plain.recipe}`",
        "16" if bits is None else f"{bits:.1f}",
        MISSING if size is None else f"{size / 1e6:.1f}",
        _percent(plain),
        MISSING if outliers is None else _percent(outliers),
        MISSING if outliers is None else error_text(outliers.action_error),
    )


def _percent(row: Row) -> str:
    return MISSING if row.success_mean is None else f"{100 * row.success_mean:.1f}"


def overview() -> list[str]:
    """The admission of tasks, the benchmark on one page, and the paper's scope."""
    parts = ["## Tasks\n", ADMISSION, "", markdown(admission_table(POLICIES))]
    parts += ["## Overview\n"]
    for name, table in benchmark_tables(rows_of(BENCHMARK)).items():
        parts += [BENCHMARK_TEXT.format(name.removeprefix("builtin:")), "", markdown(table)]
    parts += ["## The paper's scope\n"]
    for policy in POLICIES:
        name = f"{policy}-paper-scope.json"
        parts += [PAPER_SCOPE.format(policy, name=name), "", markdown(results_table(rows_of(name)))]
    return parts


def details() -> str:
    """docs/results.md: every row with its intervals."""
    found = load_comparison(RESULTS / BENCHMARK)
    run, rows = found.benchmark, found.rows
    assert run is not None
    parts = [DETAILS.format(name=BENCHMARK, **run.model_dump())]
    if run.missing:
        parts.append(f"**Not measured**: {'; '.join(run.missing)}.\n")
    parts += overview()
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
    wanted = {
        README: with_block(README.read_text("utf-8"), "results", markdown(readme_table())),
        ROOT / "docs" / "results.md": details(),
    }
    return write_or_check(wanted, arguments, "results_table.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
