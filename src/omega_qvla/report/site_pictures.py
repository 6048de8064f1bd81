"""Figures of the inside of a quantized policy: errors, ranges and outliers, site by site."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from omega_qvla.report.pictures import Picture, draw_picture
from omega_qvla.report.style import (
    AFTER,
    BEFORE,
    GREY,
    GRID,
    INK,
    part_of_matplotlib,
    plain_log_ticks,
)
from omega_qvla.report.table import MISSING, Table, crest
from omega_qvla.report.words import (
    block_words,
    condition_words,
    error_words,
    quantity,
    site_place,
    site_words,
)
from omega_qvla.results.diagnostics import Diagnostics, Profile, Site

_COLOURS = "viridis"
_SMALLEST = 1e-9
"""Errors below this have the colour of this one: it is rounding of float32."""
_KINDS_SHOWN = 6
"""Kinds of site that get a panel of their own in the figure over denoising steps."""


def diagnostics_name(found: Diagnostics) -> str:
    """``omega-w4a4-static, stress 30×``."""
    scope = "" if found.scope == "all" else f", {found.scope} scope"
    return f"{found.recipe}{scope}, {condition_words(found.condition)}"


def error_map(found: Diagnostics, number: int, span: tuple[float, float]) -> Picture:
    """Layers down, kinds of site across: what every site adds and what has arrived there.

    Args:
        found: the diagnostics.
        number: counts the figures of this kind on the page.
        span: smallest and largest error of all such figures, which share their colours.
    """
    blocks = _blocks(found.sites)
    deepest = max(len(layers) for _, layers, _, _ in blocks)

    def draw(figure: Any) -> None:
        halves = figure.subfigures(2, 1)
        image: Any = None
        for half, heading, pick in (
            (halves[0], "added by the site itself", lambda site: site.worst_local),
            (halves[1], "arrived there, with all before it", lambda site: site.worst),
        ):
            half.suptitle(heading, x=0.01, ha="left", fontsize=8.5, fontweight="bold")
            widths = [max(len(kinds), 2.4) for _, _, kinds, _ in blocks]
            panels = half.subplots(1, len(blocks), width_ratios=widths, squeeze=False)[0]
            for panel, (title, layers, kinds, cells) in zip(panels, blocks, strict=True):
                image = _heat(panel, layers, kinds, cells, pick, span)
                panel.set_title(title, fontsize=8, fontweight="normal")
            bar = half.colorbar(image, ax=list(panels), pad=0.02, aspect=14)
            bar.outline.set_visible(False)
            plain_log_ticks(bar.ax.yaxis, image.get_clim())
            bar.ax.tick_params(labelsize=7)

    worst = max(found.sites, key=lambda site: site.worst_local or 0.0)
    steps = max(len(site.error) for site in found.sites)
    seen = quantity(found.observations, "held-out observation")
    return draw_picture(
        f"sites-{number}",
        draw,
        height=2.2 + 0.26 * min(deepest, 30),
        title=f"Where the error comes from: {diagnostics_name(found)}",
        alt=(
            f"Heat map of the error of {len(found.sites)} quantized sites. The largest error of "
            f"its own has {site_words(worst.name, worst.component)}: "
            f"{error_words(worst.worst_local)}; largest error anywhere: "
            f"{error_words(max((s.worst or 0.0) for s in found.sites))}."
        ),
        caption=(
            f"Worst of {quantity(steps, 'denoising step')}, over {seen}. Adds most itself: "
            f"{site_words(worst.name, worst.component)}, {error_words(worst.worst_local)}. Action "
            f"error {error_words(found.action_error)}, noise floor "
            f"{error_words(found.noise_floor)}."
        ),
        table=_site_table(found.sites),
    )


def error_span(all_found: Sequence[Diagnostics]) -> tuple[float, float]:
    """Smallest and largest error over several diagnostics, the second at least twice the first."""
    values = [
        value
        for found in all_found
        for site in found.sites
        for value in (site.worst, site.worst_local)
        if value
    ]
    low = max(min(values, default=1e-6), _SMALLEST)
    return low, max([*values, 2 * low])


_Block = tuple[str, list[int], list[str], dict[tuple[int, str], Site]]


def _blocks(sites: Sequence[Site]) -> list[_Block]:
    """Sites by block, in execution order: (words, layers, kinds, sites by layer and kind)."""
    found: dict[str, _Block] = {}
    for site in sites:
        path, layer, kind = site_place(site.name)
        words = block_words(path, site.component)
        _, layers, kinds, cells = found.setdefault(path, (words, [], [], {}))
        layer = 0 if layer is None else layer
        if layer not in layers:
            layers.append(layer)
        if kind not in kinds:
            kinds.append(kind)
        cells[layer, kind] = site
    return [_share_column(*block) for block in found.values()]


def _share_column(
    words: str, layers: list[int], kinds: list[str], cells: dict[tuple[int, str], Site]
) -> _Block:
    """A layer that has k/v instead of q/k/v shares its column: the two never meet in a layer."""
    lone = [layer for layer in layers if (layer, "k/v") in cells]
    if "q/k/v" not in kinds or any((layer, "q/k/v") in cells for layer in lone):
        return words, layers, kinds, cells
    renamed = {(layer, "q/k/v" if kind == "k/v" else kind): s for (layer, kind), s in cells.items()}
    return words, layers, [kind for kind in kinds if kind != "k/v"], renamed


def _heat(
    panel: Any,
    layers: Sequence[int],
    kinds: Sequence[str],
    cells: dict[tuple[int, str], Site],
    pick: Any,
    span: tuple[float, float],
) -> Any:

    colors = part_of_matplotlib("colors")
    grid = [[math.nan] * len(kinds) for _ in layers]
    for (layer, kind), site in cells.items():
        value = pick(site)
        if value is not None:
            grid[layers.index(layer)][kinds.index(kind)] = max(value, span[0])
    image = panel.imshow(
        grid, cmap=_COLOURS, norm=colors.LogNorm(*span), aspect="auto", interpolation="none"
    )
    panel.set_xticks(range(len(kinds)), kinds if len(kinds) > 1 else [""], rotation=90)
    every = 1 if len(layers) <= 12 else 3
    shown = range(0, len(layers), every) if len(layers) > 1 else []
    panel.set_yticks(shown, [str(layers[i]) for i in shown])
    panel.tick_params(length=0, labelsize=7)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)
    return image


def _site_table(sites: Sequence[Site]) -> Table:
    header = ("site", "adds itself", "arrived", "peak/rms before", "after", "scale")
    rows = tuple(
        (
            site_words(site.name, site.component),
            error_words(site.worst_local),
            error_words(site.worst),
            _crest(site.absmax, site.rms),
            _crest(site.transformed_absmax, site.transformed_rms),
            "static" if site.limit is not None else "other",
        )
        for site in sites
    )
    return Table(header, rows)


def _crest(peaks: Sequence[float], rms: Sequence[float]) -> str:
    worst = crest(peaks, rms)
    return f"{worst:.1f}" if worst else MISSING


def range_picture(found: Diagnostics, number: int) -> Picture | None:
    """Activation range of the action head over the denoising steps, one panel per kind of site."""
    head = [site for site in found.sites if site.per_step and site.times and len(site.times) > 1]
    if not head:
        return None
    kinds = list(dict.fromkeys(site_place(site.name)[2] for site in head))
    shown = kinds[:_KINDS_SHOWN]
    rows = -(-len(shown) // 2)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
        for panel, kind in zip(panels, shown, strict=False):
            mine = _of_kind(head, kind)
            times = mine[0].times or []
            _band(panel, times, [site.absmax for site in mine], BEFORE, "largest, before")
            _band(panel, times, [s.transformed_absmax for s in mine], AFTER, "largest, after")
            _middle(panel, times, [s.transformed_rms for s in mine], AFTER, ":", "rms, after")
            limits = [site.limit for site in mine if site.limit is not None]
            if limits:
                _middle(panel, times, limits, INK, "--", "largest integer")
            if any(value > 0 for site in mine for value in site.absmax):
                panel.set_yscale("log")
                plain_log_ticks(panel.yaxis, panel.get_ylim())
            else:
                panel.annotate("zeros alone", (0.5, 0.5), xycoords="axes fraction", ha="center")
            panel.set_title(kind, fontsize=8.5)
            panel.set_xlim(max(times), min(times))
            panel.grid(color=GRID, linewidth=0.8)
            panel.set_axisbelow(True)
            panel.tick_params(labelsize=7)
        for panel in panels[len(shown) :]:
            panel.set_axis_off()
        figure.supxlabel("flow time: noise (1) → actions (0)", fontsize=8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)

    layers = max(len(_of_kind(head, kind)) for kind in shown)
    drift = [max(site.absmax) / min(site.absmax) for site in head if min(site.absmax) > 0]
    most = f" The largest input changes by up to {max(drift):.1f}× over the steps." if drift else ""
    left = len(kinds) - len(shown)
    rest = f" {quantity(left, 'further kind')} of site left out." if left else ""
    static = any(site.limit is not None for site in head)
    meaning = "" if static else " No static scale per step here, so no limit is drawn."
    return draw_picture(
        f"ranges-{number}",
        draw,
        height=1.0 + 1.35 * rows,
        title=f"Activation range over denoising steps: {diagnostics_name(found)}",
        alt=(
            f"Largest input of the action head's sites at each of {len(head[0].times or [])} "
            f"denoising steps, before and after the transform.{most}"
        ),
        caption=f"{quantity(layers, 'layer')} per panel.{most}{meaning}{rest}",
        table=_range_table(head),
    )


def _of_kind(head: Sequence[Site], kind: str) -> list[Site]:
    """Sites of one kind that were seen at the same flow times as the first of them."""
    mine = [site for site in head if site_place(site.name)[2] == kind]
    return [site for site in mine if site.times == mine[0].times]


def _band(
    panel: Any, times: Sequence[float], series: Sequence[Sequence[float]], colour: str, label: str
) -> None:
    _middle(panel, times, series, colour, "-", label)
    columns = list(zip(*series, strict=False))
    floor = [_positive(min(column)) for column in columns]
    panel.fill_between(
        times, floor, [_positive(max(c)) for c in columns], color=colour, alpha=0.2, linewidth=0
    )


def _middle(
    panel: Any,
    times: Sequence[float],
    series: Sequence[Sequence[float]],
    colour: str,
    line: str,
    label: str,
) -> None:
    values = [_positive(statistics.median(column)) for column in zip(*series, strict=False)]
    panel.plot(times, values, line, color=colour, linewidth=1.4, label=label)


def _positive(value: float) -> float:
    """For a log scale: a site that read zeros alone leaves a gap."""
    return value if value > 0 else math.nan


def _range_table(head: Sequence[Site]) -> Table:
    times = head[0].times or []
    rows = tuple(
        (site_words(site.name, site.component), *(f"{value:.3g}" for value in site.absmax))
        for site in head
        if len(site.absmax) == len(times)
    )
    return Table(("largest input", *(f"t = {time:.2g}" for time in times)), rows)


def outlier_picture(found: Diagnostics, number: int) -> Picture | None:
    """Largest magnitude of every input channel, before and after the transform."""
    profiles = found.profiles
    if not profiles:
        return None

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(profiles), 2, sharey="row", squeeze=False)
        for row, profile in zip(panels, profiles, strict=True):
            top = max(*profile.before, *profile.after, 1e-12)
            for panel, values, colour in (
                (row[0], profile.before, BEFORE),
                (row[1], profile.after, AFTER),
            ):
                panel.fill_between(
                    range(len(values)), values, step="mid", color=colour, linewidth=0.4
                )
                panel.set_ylim(0, top * 1.35)
                panel.set_xlim(0, max(len(values) - 1, 1))
                panel.set_xticks([])
                panel.tick_params(labelsize=7)
                panel.annotate(
                    f"peak/median {_ratio(values)}",
                    (0.99, 0.86),
                    xycoords="axes fraction",
                    ha="right",
                    fontsize=7.5,
                    color=GREY,
                )
            row[0].set_title(site_words(profile.site, profile.component), fontsize=8.5)
        panels[-1][0].set_xlabel("before: channels")
        panels[-1][1].set_xlabel("after: channels")

    first, last = (_medians(profiles, side) for side in ("before", "after"))
    identical = all(profile.before == profile.after for profile in profiles)
    verdict = (
        "This recipe has no transform: both sides are the same."
        if identical
        else f"The worst peak is {first:.0f} times the median channel before, {last:.1f} after."
    )
    rows = tuple(
        (
            site_words(profile.site, profile.component),
            f"{profile.channels:,}",
            f"{max(profile.before):.3g}",
            _ratio(profile.before),
            f"{max(profile.after):.3g}",
            _ratio(profile.after),
        )
        for profile in profiles
    )
    header = ("site", "channels", "peak before", "peak/median", "peak after", "peak/median after")
    return draw_picture(
        f"outliers-{number}",
        draw,
        height=0.55 + 0.85 * len(profiles),
        title=f"Outliers before and after the transform: {diagnostics_name(found)}",
        alt=f"Largest magnitude by input channel at {quantity(len(profiles), 'site')}. {verdict} "
        + "; ".join(f"{r[0]}: {r[3]} before, {r[5]} after" for r in rows),
        caption=verdict,
        table=Table(header, rows),
    )


def _ratio(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{max(values) / middle:.1f}" if middle > 0 else MISSING


def _medians(profiles: Sequence[Profile], side: str) -> float:
    ratios = [
        max(values) / statistics.median(values)
        for profile in profiles
        if statistics.median(values := getattr(profile, side)) > 0
    ]
    return max(ratios, default=0.0)
