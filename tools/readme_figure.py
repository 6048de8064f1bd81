"""Draw docs/images/results.svg, the picture of README.md, from the saved JSON, or check it.

Usage: ``python tools/readme_figure.py [--check]``.  Left: success of the embedded pi0.5, as it is
and with outliers.  Right: bytes of the full-size policies.  The file holds a hash of the numbers
and of this script, and the check compares that: another version of matplotlib draws other bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from generated import ROOT

from omega_qvla.report.style import CONDITION_COLOURS, GREY, RC, matplotlib_modules
from omega_qvla.results.reading import load_as, load_comparison
from omega_qvla.results.speed import PolicyBench

PICTURE = ROOT / "docs" / "images" / "results.svg"
RESULTS = ROOT / "benchmarks" / "results"
POLICY, OUTLIERS = "builtin:tiny-pi05", "stress:30"
RECIPES = {
    "fp32": "full precision",
    "rtn": "rtn",
    "quarot": "quarot",
    "omega-paper": "omega\n-paper*",
    "omega-w4a4-no-prior": "omega-w4a4\n-no-prior",
}
FULL_SIZE = {"pi0.5": "cpu-pi05-chunk.json", "GR00T N1.5": "cpu-gr00t-chunk.json"}
Bar = tuple[float, float, float]
"""A rate in percent and the ends of its interval."""


def numbers() -> dict[str, Any]:
    """What is drawn: ``success`` by recipe, ``bytes`` by policy, before and after."""
    rows = [r for r in load_comparison(RESULTS / "benchmark-v1.json").rows if r.policy == POLICY]
    success: dict[str, list[Bar | None]] = {name: [None, None] for name in RECIPES}
    for row in rows:
        if row.recipe in RECIPES and row.condition in ("plain", OUTLIERS):
            assert row.success_mean is not None and row.success_ci95 is not None
            bar = 100 * row.success_mean, 100 * row.success_ci95[0], 100 * row.success_ci95[1]
            success[row.recipe][row.condition == OUTLIERS] = bar
    size = {
        title: [row.checkpoint_bytes for row in load_as(PolicyBench, RESULTS / name, "bench").rows]
        for title, name in FULL_SIZE.items()
    }
    return {"success": success, "bytes": size}


def digest(found: dict[str, Any]) -> str:
    """SHA-256 of the numbers and of this script."""
    text = json.dumps(found, sort_keys=True) + Path(__file__).read_text("utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def draw(found: dict[str, Any]) -> bytes:
    """The picture as SVG, its letters as outlines."""
    matplotlib, figure_module = matplotlib_modules()
    with matplotlib.rc_context({**RC, "svg.hashsalt": "omega-qvla"}):
        figure = figure_module.Figure(figsize=(8.6, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        _draw_success(left, found["success"])
        _draw_bytes(right, found["bytes"])
        stream = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Description": digest(found)}
        figure.savefig(stream, format="svg", facecolor="white", metadata=metadata)
    return stream.getvalue()


def _draw_success(axes: Any, success: dict[str, list[Bar | None]]) -> None:
    for place, kind in enumerate(("as it is", "with outliers ×30")):
        for column, bars in enumerate(success.values()):
            bar, x = bars[place], column + 0.4 * (place - 0.5)
            if bar is None:
                continue
            mean, low, high = bar
            label = kind if column == 1 else None
            axes.bar(x, mean, 0.36, color=CONDITION_COLOURS[place], label=label)
            axes.errorbar(x, mean, [[mean - low], [high - mean]], color="black", lw=1)
            axes.annotate(f"{mean:.1f}", (x, high + 2), ha="center", fontsize=9)
    axes.set_xticks(range(len(success)), RECIPES.values())
    axes.set(ylim=(0, 119), yticks=(0, 50, 100), title="Success in simulation, %")
    axes.legend(loc="upper center", ncols=2, frameon=False, fontsize=8.5)
    axes.set_xlabel("embedded pi0.5, 400 episodes, 95 % intervals; * simulation", color=GREY)


def _draw_bytes(axes: Any, size: dict[str, list[int]]) -> None:
    for place, kind in enumerate(("bfloat16", "W4A4")):
        for column, counts in enumerate(size.values()):
            x, gigabytes = column + 0.4 * (place - 0.5), counts[place] / 1e9
            label = kind if column == 0 else None
            axes.bar(
                x, gigabytes, 0.36, color=("#999999", CONDITION_COLOURS[2])[place], label=label
            )
            axes.annotate(f"{gigabytes:.2f}", (x, gigabytes + 0.1), ha="center", fontsize=9)
    axes.set_xticks(range(len(size)), size)
    axes.set(title="Whole checkpoint, GB", ylim=(0, 8.4))
    axes.legend(loc="upper right", frameon=False, fontsize=8.5)
    axes.set_xlabel("full size", color=GREY)


def main(arguments: list[str]) -> int:
    """Draw or check; returns the exit status."""
    found = numbers()
    if arguments != ["--check"]:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_bytes(draw(found))
        return 0
    text = PICTURE.read_text("utf-8") if PICTURE.exists() else ""
    held = re.search(r"<dc:description>(\w+)</dc:description>", text)
    if held and held[1] == digest(found):
        return 0
    print("docs/images/results.svg is out of date; run python tools/readme_figure.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
