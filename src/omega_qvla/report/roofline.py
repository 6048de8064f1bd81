"""The roofline of measured kernels, drawn from the JSON of ``bench kernels`` or ``bench-gpu``.

Every mark is one layer: how many multiply-adds it does for each byte of weight that has to come
from memory (to the right: more rows share a weight), and how many a second it reached.  No mark can
lie above the roof: the slope is the measured memory bandwidth, the flat part what the instructions
can do with operands in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omega_qvla.report.style import RC, matplotlib_modules, save_png
from omega_qvla.results.reading import load_as
from omega_qvla.results.speed import LayerRate, LayerRates

_BYTES_PER_WEIGHT = {
    "torch fp32": 4.0,
    "torch int8 dynamic": 1.0,
    "llama.cpp Q4_0": 18 / 32,
    "cuBLAS bf16": 2.0,
}
_OURS = 0.5
_WRITER = "`omega-qvla bench kernels --json` or `make bench-gpu`"
_STYLE = {
    "torch fp32": ("#999999", "s", "torch fp32"),
    "torch int8 dynamic": ("#E69F00", "D", "torch int8 dynamic"),
    "llama.cpp Q4_0": ("#009E73", "^", "llama.cpp Q4_0"),
    "cuBLAS bf16": ("#999999", "s", "cuBLAS bf16"),
}
_OUR_COLOUR = "#0072B2"


def roofline_figure(json_path: str | Path, png_path: str | Path) -> Path:
    """Draw a saved kernel benchmark.

    Raises:
        ResultError: the file is not one.
        ResourceError: matplotlib is not installed, or the picture cannot be written.
    """
    found = load_as(LayerRates, json_path, _WRITER)
    matplotlib, figure_module = matplotlib_modules()
    with matplotlib.rc_context(RC):
        figure = figure_module.Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.subplots()
        _draw_roofs(axes, found)
        _draw_marks(axes, found.rows)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("multiply-adds per byte of weight")
        axes.set_ylabel("10⁹ multiply-adds per second")
        threads = "" if found.threads is None else f", {found.threads} thread(s)"
        axes.set_title(f"Quantized linears on {found.machine}{threads}")
        axes.legend(loc="lower right", frameon=False)
        return save_png(figure, png_path)


def _draw_roofs(axes: Any, found: LayerRates) -> None:
    bandwidth = found.memory_gbytes
    for name, peak in found.peak_gmacs.items():
        if name == "generic":
            continue
        corner = peak / bandwidth
        axes.plot([1, corner, 5000], [bandwidth, peak, peak], color="#444444", linewidth=1)
        axes.annotate(f"{name}: {peak:.0f}", (5000, peak), ha="right", va="bottom", color="#444444")
    axes.annotate(
        f"memory: {bandwidth:.0f} GB/s", (2.6, 2.9 * bandwidth), rotation=38, color="#444444"
    )


def _draw_marks(axes: Any, rows: Sequence[LayerRate]) -> None:
    # A weight that stays in a cache is not bound by memory, whose roof this is.
    rows = [row for row in rows if not row.weights_in_cache]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        colour, marker, label = _STYLE.get(kernel, (_OUR_COLOUR, "o", f"W4A4 ({kernel})"))
        size = _BYTES_PER_WEIGHT.get(kernel, _OURS)
        mine = [row for row in rows if row.kernel == kernel]
        axes.scatter(
            [row.M / size for row in mine],
            [row.gmacs for row in mine],
            s=22,
            color=colour,
            marker=marker,
            label=label,
            alpha=0.8,
            linewidths=0,
        )
