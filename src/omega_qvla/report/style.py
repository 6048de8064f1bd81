"""One visual language for every figure: colours, type, and how a figure becomes a file.

Colours are those of Okabe and Ito, which stay apart for colour-blind readers; markers differ as
well, so that figures survive grey printing.  A figure is drawn once and saved twice: as PNG on
white, and as SVG for the page, in which ink, grey and grid become CSS variables, so that it follows
the reader's light or dark scheme and stays sharp in print.
"""

from __future__ import annotations

import importlib
import io
import math
import re
from pathlib import Path
from typing import Any

from omega_qvla.extras import needing
from omega_qvla.files import write_file

CONDITION_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("o", "D", "s", "^")
BYTES_COLOURS = {"checkpoint": "#4D4D4D", "resident": "#B3B3B3"}
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
BEFORE, AFTER = "#D55E00", "#0072B2"
INK, GREY, GRID = "#1B1B1B", "#666666", "#E5E5E5"
RC: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "ytick.major.size": 0,
    "savefig.dpi": 150,
}
PAGE_RC: dict[str, Any] = {
    **RC,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a recipe may have a dollar sign in its name
    "svg.fonttype": "none",
    "svg.hashsalt": "omega-qvla",
}
WIDTH_IN = 4.2
"""Width of a figure of the page: one column of a phone, half a desktop window."""

_VARIABLES = {INK: "var(--ink)", GREY: "var(--muted)", GRID: "var(--grid)"}
_FONT = re.compile(r"font: ([0-9a-z .]*?)([0-9.]+)px [^;\"]*")
_PATH = re.compile(r'\bd="[^"]*"')
_DECIMALS = re.compile(r"(\d+\.\d\d)\d+")
"""A hundredth of a point is finer than any screen or printer, and halves the page."""
_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(
    r'(<svg[^>]*?) width="[^"]*pt"([^>]*?) height="[^"]*pt"|'
    r'(<svg[^>]*?) height="[^"]*pt"([^>]*?) width="[^"]*pt"'
)


def matplotlib_modules() -> tuple[Any, Any]:
    """matplotlib and its figure module, which draws with Agg and needs no display.

    Raises:
        MissingPackageError: names the extra.
    """
    with needing("drawing figures", "report"):
        return importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")


def part_of_matplotlib(name: str) -> Any:
    """A module of matplotlib, once :func:`matplotlib_modules` has found it installed."""
    return importlib.import_module(f"matplotlib.{name}")


def new_figure(height: float) -> Any:
    """An empty figure of the page's width; draw it inside ``matplotlib.rc_context(PAGE_RC)``."""
    _, figure_module = matplotlib_modules()
    return figure_module.Figure(figsize=(WIDTH_IN, height), layout="constrained")


def plain_log_ticks(axis: Any, limits: tuple[float, float]) -> None:
    """Label a logarithmic axis with plain numbers: decades, and steps between where it is short."""
    ticker = part_of_matplotlib("ticker")
    decades = math.log10(max(limits) / min(limits))
    steps = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def save_png(figure: Any, path: str | Path) -> Path:
    """Write a figure of its own, with the settings that hold where this is called.

    Raises:
        ResourceError: it cannot be written.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    write_file(Path(path), stream.getvalue())
    return Path(path)


def as_png(figure: Any) -> bytes:
    """The figure as a PNG file on white; the same figure gives the same bytes."""
    stream = io.BytesIO()
    with matplotlib_modules()[0].rc_context(PAGE_RC):
        figure.savefig(
            stream, format="png", dpi=200, facecolor="white", metadata={"Software": None}
        )
    return stream.getvalue()


def as_svg(figure: Any, name: str) -> str:
    """The figure as an ``<svg>`` element for a page.

    Ids are prefixed with ``name``, since several figures share a page; size comes from the page;
    the three neutral colours become its CSS variables.
    """
    stream = io.BytesIO()
    hidden = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", transparent=True, metadata=hidden)
    text = stream.getvalue().decode("utf-8")
    text = _METADATA.sub("", _PROLOGUE.sub("", text))
    text = _SIZE.sub(lambda found: "".join(part for part in found.groups() if part), text, count=1)
    text = _PATH.sub(lambda found: _DECIMALS.sub(r"\1", found.group()), text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = _FONT.sub(r"font: \1\2px var(--sans)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour.lower(), variable)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip()
