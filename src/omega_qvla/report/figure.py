"""One picture of a saved comparison: success, action error and bytes, side by side.

Recipes are lines, shared by three panels that are read from left to right: does it still work
(success rate with Wilson's interval), how far is it from full precision (log scale, with the noise
floor for proportion), what does it cost.  Plain and stress are two colours that stay apart for
colour-blind readers and in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.report.style import (
    BYTES_COLOURS,
    CONDITION_COLOURS,
    GREY,
    GRID,
    MARKERS,
    RC,
    matplotlib_modules,
    part_of_matplotlib,
    save_png,
)
from omega_qvla.results.rows import Row


@dataclass(frozen=True)
class _Layout:
    """Which recipe is on which line, and which condition has which colour and offset."""

    lines: list[str]
    conditions: list[str]
    results: dict[tuple[str, str], Row]

    def place(self, line: str, condition: str) -> float:
        """Vertical position of a mark."""
        count = len(self.conditions)
        offset = (self.conditions.index(condition) - (count - 1) / 2) * min(0.32, 0.8 / count)
        return self.lines.index(line) + offset

    def style(self, condition: str) -> dict[str, Any]:
        """Colour and marker of a condition."""
        index = self.conditions.index(condition)
        return {
            "color": CONDITION_COLOURS[index % len(CONDITION_COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
        }


def comparison_figure(results: Sequence[Row], png_path: str | Path) -> Path:
    """Draw a saved comparison.

    Args:
        results: rows of a comparison.
        png_path: the picture; written atomically.

    Returns:
        ``png_path``.

    Raises:
        ResourceError: matplotlib is not installed, or the picture cannot be written.
    """
    matplotlib, figure_module = matplotlib_modules()
    layout = _arrange(results)
    with matplotlib.rc_context(RC):
        height = 1.75 + (0.34 + 0.2 * len(layout.conditions)) * len(layout.lines)
        figure = figure_module.Figure(figsize=(12, height), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.15, 1.15, 1))
        _draw_success(panels[0], layout)
        _draw_error(panels[1], layout)
        _draw_bytes(panels[2], layout)
        _finish(figure, panels, layout)
        return save_png(figure, png_path)


def _arrange(results: Sequence[Row]) -> _Layout:
    several = len({result.policy for result in results}) > 1
    named = {(_line(result, several), result.condition): result for result in results}
    lines = list(dict.fromkeys(line for line, _ in named))
    return _Layout(lines, list(dict.fromkeys(condition for _, condition in named)), named)


def _line(result: Row, several: bool) -> str:
    name = f"{result.policy}\n{result.recipe}" if several else result.recipe
    if result.scope not in (None, "all"):
        name += f" ({result.scope})"
    return name if result.realizable else f"{name}\n(simulated)"


def _draw_success(panel: Any, layout: _Layout) -> None:
    counts: set[int] = set()
    for (line, condition), result in layout.results.items():
        if result.success_mean is None or result.success_ci95 is None:
            continue
        counts.add(result.episodes)
        mean, (low, high) = 100 * result.success_mean, result.success_ci95
        y, style = layout.place(line, condition), layout.style(condition)
        spread = [[max(0.0, mean - 100 * low)], [max(0.0, 100 * high - mean)]]
        panel.errorbar(mean, y, xerr=spread, capsize=3, markersize=6, linestyle="none", **style)
        _label(panel, f"{mean:.0f}", mean, y)
    panel.set_xlim(-3, 103)
    panel.set_xlabel(_success_caption(counts, layout))
    panel.set_title("Success rate, %")
    if not counts:
        _say_nothing(panel, "not simulated")


def _success_caption(counts: set[int], layout: _Layout) -> str:
    if not counts:
        return ""
    few, many = min(counts), max(counts)
    number = f"{few}" if few == many else f"{few}–{many}"
    smoke = any(result.smoke for result in layout.results.values())
    return f"Wilson 95 % over {number} episodes" + (" (smoke test)" if smoke else "")


def _draw_error(panel: Any, layout: _Layout) -> None:
    floors: list[float] = []
    values: list[float] = []
    for (line, condition), result in layout.results.items():
        if result.noise_floor:
            floors.append(result.noise_floor)
        if not result.action_error:
            continue
        values.append(result.action_error)
        y = layout.place(line, condition)
        panel.plot(
            result.action_error, y, markersize=6, linestyle="none", **layout.style(condition)
        )
        _label(panel, f"{result.action_error:.2g}", result.action_error, y)
    panel.set_title("Action error, log scale")
    if not values:
        _say_nothing(panel, "not measured")
        return
    panel.set_xscale("log")
    panel.set_xlim(min(values + floors) / 2.5, max(values + floors) * 4)
    panel.set_xlabel("relative MSE against full precision")
    _mark_references(panel, layout)
    _mark_floors(panel, layout)


def _mark_floors(panel: Any, layout: _Layout) -> None:
    """The noise floor of each line; policies differ, so a new value is labelled where it starts."""
    previous = None
    for index, line in enumerate(layout.lines):
        rows = [result for (name, _), result in layout.results.items() if name == line]
        floor = max((row.noise_floor for row in rows if row.noise_floor), default=None)
        if floor is not None:
            panel.vlines(
                floor, index - 0.5, index + 0.5, color=GREY, linestyle="--", linewidth=1, zorder=0
            )
        if floor is not None and floor != previous:
            panel.annotate(
                f"noise floor {floor:.2g}",
                (floor, index - 0.5),
                xytext=(-4, -2),
                textcoords="offset points",
                ha="right",
                va="top",
                color=GREY,
                fontsize=8,
            )
        previous = floor


def _mark_references(panel: Any, layout: _Layout) -> None:
    for line in layout.lines:
        rows = [result for (name, _), result in layout.results.items() if name == line]
        if all(result.is_full_precision for result in rows):
            panel.annotate(
                "reference",
                (0.02, layout.lines.index(line)),
                xycoords=("axes fraction", "data"),
                va="center",
                color=GREY,
                fontsize=9,
            )


def _draw_bytes(panel: Any, layout: _Layout) -> None:
    largest = 0.0
    for index, line in enumerate(layout.lines):
        rows = [result for (name, _), result in layout.results.items() if name == line]
        for offset, kind in ((-0.17, "checkpoint"), (0.17, "resident")):
            sizes = [size for row in rows if (size := getattr(row, f"{kind}_bytes")) is not None]
            if sizes:
                size = max(sizes) / 1e6
                largest = max(largest, size)
                y = index + offset
                panel.barh(y, size, height=0.3, color=BYTES_COLOURS[kind], zorder=2)
                panel.annotate(
                    f"{size:.3g}",
                    (size, y),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
    panel.set_title("Size, MB")
    if largest == 0:
        _say_nothing(panel, "not measured")
        return
    panel.set_xlim(0, largest * 1.15)
    panel.set_xlabel("whole policy, quantized or not")


def _label(panel: Any, text: str, x: float, y: float) -> None:
    panel.annotate(text, (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)


def _say_nothing(panel: Any, text: str) -> None:
    panel.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", color=GREY)
    panel.set_xticks([])


def _finish(figure: Any, panels: Sequence[Any], layout: _Layout) -> None:
    first = panels[0]
    first.set_yticks(range(len(layout.lines)), layout.lines)
    first.set_ylim(len(layout.lines) - 0.45, -0.6)
    for panel in panels:
        panel.grid(axis="x", color=GRID, linewidth=0.8, zorder=-1)
        panel.set_axisbelow(True)
        for boundary in range(1, len(layout.lines)):
            panel.axhline(boundary - 0.5, color="#F0F0F0", linewidth=0.8, zorder=-1)
    lines, patches = part_of_matplotlib("lines"), part_of_matplotlib("patches")
    handles = [
        lines.Line2D([], [], linestyle="none", label=condition, **layout.style(condition))
        for condition in layout.conditions
    ]
    handles += [
        patches.Patch(color=colour, label=f"{kind} size") for kind, colour in BYTES_COLOURS.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    policies = dict.fromkeys(result.policy for result in layout.results.values())
    figure.suptitle(", ".join(policies), x=0.01, ha="left", fontsize=12)
