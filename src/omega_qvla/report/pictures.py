"""A figure of the page: SVG for it, PNG where that is asked for, with its words and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from omega_qvla.report.style import PAGE_RC, as_png, as_svg, matplotlib_modules, new_figure
from omega_qvla.report.table import Table


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: stable; names the PNG and the SVG's ids.
        title: heading on the page.
        alt: what the figure shows, for those who cannot see it; with the main values.
        caption: how to read it, what is good, where the numbers come from.
        table: the numbers behind it, for the page; None where a table says it already.
    """

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    draw_png: Callable[[], bytes]
    table: Table | None = None

    @property
    def png(self) -> bytes:
        """The figure on white."""
        return self.draw_png()


def draw_picture(
    name: str,
    draw: Callable[[Any], None],
    *,
    height: float,
    title: str,
    alt: str,
    caption: str,
    table: Table | None = None,
) -> Picture:
    """Make a figure of the page's width and let ``draw`` fill it.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    matplotlib, _ = matplotlib_modules()
    with matplotlib.rc_context(PAGE_RC):
        figure = new_figure(height)
        draw(figure)
        svg = as_svg(figure, name)
    return Picture(name, title, alt, caption, svg, partial(as_png, figure), table)
