"""Figures of what was evaluated: success, action error against bytes, memory, latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omega_qvla.report.pictures import Picture, draw_picture
from omega_qvla.report.sources import Sourced
from omega_qvla.report.style import (
    CONDITION_COLOURS,
    GREY,
    GRID,
    MARKERS,
    SERIES,
    part_of_matplotlib,
    plain_log_ticks,
)
from omega_qvla.report.table import MISSING, Table, human_bytes
from omega_qvla.report.words import condition_words, error_words, listing, row_name, share
from omega_qvla.results.memory import Memory
from omega_qvla.results.rows import Row
from omega_qvla.results.speed import PolicySpeed


def success_pictures(results: Sequence[Row]) -> list[Picture]:
    """One figure per policy: success rates with their intervals."""
    found: list[Picture] = []
    for number, policy in enumerate(dict.fromkeys(row.policy for row in results), start=1):
        mine = [row for row in results if row.policy == policy]
        flown = [row for row in mine if row.success_mean is not None and row.success_ci95]
        if flown:
            found.append(_success(policy, mine, flown, number))
    return found


def _success(policy: str, mine: Sequence[Row], flown: Sequence[Row], number: int) -> Picture:
    names = list(dict.fromkeys(row_name(row) for row in flown))
    conditions = list(dict.fromkeys(row.condition for row in flown))
    gaps = [row for row in mine if row not in flown and row.condition in conditions]
    absent = list(dict.fromkeys(row_name(row) for row in mine if row_name(row) not in names))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row in flown:
            place = conditions.index(row.condition)
            y = _offset(names.index(row_name(row)), place, len(conditions))
            assert row.success_mean is not None and row.success_ci95 is not None
            mean, (low, high) = 100 * row.success_mean, row.success_ci95
            spread = [[max(0.0, mean - 100 * low)], [max(0.0, 100 * high - mean)]]
            axes.errorbar(
                mean,
                y,
                xerr=spread,
                capsize=3,
                markersize=5.5,
                linestyle="none",
                color=_colour(place),
                marker=MARKERS[place % len(MARKERS)],
                markerfacecolor="none" if row.unfinished else _colour(place),
            )
            _beside(axes, f"{mean:.1f}", 100 * high, y)
        for row in [row for row in gaps if row_name(row) in names]:
            y = _offset(
                names.index(row_name(row)), conditions.index(row.condition), len(conditions)
            )
            axes.annotate("not simulated", (2, y), va="center", color=GREY, fontsize=8)
        _rows(axes, names)
        axes.set_xlim(-2, 112)
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.set_xlabel("episodes solved, %")
        _legend(figure, conditions)

    few, many = (limit(row.episodes for row in flown) for limit in (min, max))
    count = f"{few}" if few == many else f"{few} to {many}"
    smoke = (
        " With fewer than 100 episodes per task this is a smoke test, too few for a claim."
        if any(row.smoke for row in flown)
        else ""
    )
    missing = f" Not simulated: {listing(absent)}." if absent else ""
    rates = [
        f"{row_name(row)}, {condition_words(row.condition)}: {100 * (row.success_mean or 0):.1f} %"
        for row in flown
    ]
    return draw_picture(
        f"success-{number}",
        draw,
        height=0.9 + max(0.34, 0.12 + 0.145 * len(conditions)) * len(names),
        title=f"Does it still work? {policy}",
        alt=f"Success rates of {policy}. {'; '.join(rates)}.",
        caption=(
            f"Share of simulated episodes solved, the same seeds in every row, {count} episodes "
            "each; further right is better. Whiskers are Wilson 95 % intervals; hollow marks are "
            f"unfinished runs.{smoke}{missing}"
        ),
        table=_task_table(flown),
    )


def _task_table(rows: Sequence[Row]) -> Table:
    tasks = list(dict.fromkeys(task for row in rows for task in row.success))
    lines = tuple(
        (
            row_name(row),
            row.condition,
            *("{}/{}".format(*row.success[t]) if t in row.success else MISSING for t in tasks),
        )
        for row in rows
    )
    return Table(("recipe", "condition", *tasks), lines)


def error_pictures(results: Sequence[Row]) -> list[Picture]:
    """One figure per policy and condition: action error against the bytes of the checkpoint."""
    found: list[Picture] = []
    finished = [row for row in results if not row.unfinished]
    for policy in dict.fromkeys(row.policy for row in finished):
        mine = [row for row in finished if row.policy == policy]
        names = list(dict.fromkeys(row_name(row) for row in mine if not row.is_full_precision))
        values = [v for row in mine for v in (row.action_error, row.noise_floor) if v]
        for condition in dict.fromkeys(row.condition for row in mine):
            rows = [row for row in mine if row.condition == condition]
            if any(row.action_error and not row.is_full_precision for row in rows):
                place = _ErrorPlace(names, min(values) / 2.2, max(values) * 2.2)
                found.append(_error(policy, condition, rows, place, len(found) + 1))
    return found


@dataclass(frozen=True)
class _ErrorPlace:
    """What the error figures of one policy share, so that they can be compared by eye."""

    names: Sequence[str]
    low: float
    high: float

    def style(self, name: str) -> dict[str, Any]:
        """Colour and marker of a recipe."""
        index = self.names.index(name)
        return {
            "color": SERIES[index % len(SERIES)],
            "marker": MARKERS[(index + index // len(SERIES)) % len(MARKERS)],
            "linestyle": "none",
            "markersize": 7,
        }


def _error(
    policy: str, condition: str, rows: Sequence[Row], place: _ErrorPlace, number: int
) -> Picture:
    measured = [row for row in rows if row.action_error and not row.is_full_precision]
    placed = [(row, size) for row in measured if (size := _size(row)) is not None]
    floors = sorted({row.noise_floor for row in rows if row.noise_floor})
    full = next((size for row in rows if row.is_full_precision and (size := _size(row))), None)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_yscale("log")
        for row, size in placed:
            style = place.style(row_name(row))
            fill = style["color"] if row.realizable else "none"
            axes.plot(size, row.action_error, markerfacecolor=fill, markeredgewidth=1.4, **style)
        for floor in floors:
            axes.axhline(floor, color=GREY, linestyle="--", linewidth=1, zorder=0)
            _remark(axes, f"noise floor {floor:.2g}", (0, floor), ("axes fraction", "data"), (3, 3))
        if full is not None:
            axes.axvline(full, color=GREY, linewidth=1, zorder=0)
            _remark(axes, "full precision", (full, 1), ("data", "axes fraction"), (-11, -66), 90)
        axes.set_xlim(0, 1.12 * max([size for _, size in placed] + [full or 0.0]))
        axes.set_ylim(place.low, place.high)
        plain_log_ticks(axes.yaxis, (place.low, place.high))
        axes.grid(color=GRID, linewidth=0.8, zorder=-1)
        axes.set_xlabel("whole checkpoint, MB")
        axes.set_ylabel("action error, log scale")
        lines = part_of_matplotlib("lines")
        handles = [
            lines.Line2D(
                [],
                [],
                label=row_name(row),
                markerfacecolor=place.style(row_name(row))["color"] if row.realizable else "none",
                **place.style(row_name(row)),
            )
            for row, _ in placed
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, frameon=False)

    absent = [row_name(row) for row in measured if _size(row) is None]
    gap = f" Not shown, because no size was measured: {listing(absent)}." if absent else ""
    hollow = ""
    if any(not row.realizable for row, _ in placed):
        hollow = " Hollow: a simulation, which cannot be stored; placed at its bytes in memory."
    told = [
        f"{row_name(row)}: error {error_words(row.action_error)}, {human_bytes(int(size * 1e6))}"
        for row, size in placed
    ]
    return draw_picture(
        f"error-{number}",
        draw,
        height=2.9 + 0.2 * -(-len(placed) // 2),
        title=f"What does it cost? {policy}, {condition_words(condition)}",
        alt=f"Action error against bytes of {policy}, {condition_words(condition)}. "
        f"{'; '.join(told)}.",
        caption=f"Down and left is better.{hollow}{gap}",
        table=Table(
            ("recipe", "action error", "bytes"),
            tuple(
                (row_name(row), error_words(row.action_error), human_bytes(int(size * 1e6)))
                for row, size in placed
            ),
        ),
    )


def _remark(
    axes: Any,
    text: str,
    place: tuple[float, float],
    coordinates: tuple[str, str],
    shift: tuple[float, float],
    rotation: float = 0,
) -> None:
    axes.annotate(
        text,
        place,
        xycoords=coordinates,
        xytext=shift,
        textcoords="offset points",
        rotation=rotation,
        color=GREY,
        fontsize=8,
    )


def _size(row: Row) -> float | None:
    """Megabytes of the checkpoint; of a simulation, which has none, those it holds in memory."""
    size = row.checkpoint_bytes if row.realizable else row.resident_bytes
    return None if size is None else size / 1e6


def memory_pictures(memories: Sequence[tuple[str, Memory]]) -> list[Picture]:
    """One figure per memory table: bytes by component, in 16 bits and as stored."""
    return [_memory(label, memory, number) for number, (label, memory) in enumerate(memories, 1)]


def _memory(label: str, memory: Memory, number: int) -> Picture:
    parts = list(memory.components)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, part in enumerate(parts):
            for offset, size, colour in (
                (-0.19, part.reference_bytes, "#B3B3B3"),
                (0.19, part.bytes, CONDITION_COLOURS[0]),
            ):
                axes.barh(index + offset, size / 1e6, height=0.34, color=colour, zorder=2)
                _beside(axes, f"{size / 1e6:.3g}", size / 1e6, index + offset)
        _rows(axes, [part.name.replace("_", " ") for part in parts])
        widest = max(max(part.reference_bytes, part.bytes) for part in parts) / 1e6
        axes.set_xlim(0, max(widest, 1e-9) * 1.16)
        axes.set_xlabel("MB")
        patches = part_of_matplotlib("patches")
        handles = [
            patches.Patch(color="#B3B3B3", label="16 bit"),
            patches.Patch(color=CONDITION_COLOURS[0], label="as stored"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)

    saved = memory.reduction
    whole = (
        f"{human_bytes(int(memory.total_bytes))} against {human_bytes(int(memory.reference_bytes))}"
    )
    narrow = memory.paper_scope_reduction
    paper = (
        f" By the paper's count, the linears of backbone and action head alone: {share(narrow)}."
        if narrow is not None
        else ""
    )
    rows = tuple(
        (
            part.name.replace("_", " "),
            f"{part.params:,}",
            f"{8 * part.bytes / part.params:.2f}" if part.params else MISSING,
            human_bytes(int(part.bytes)),
            human_bytes(int(part.reference_bytes)),
        )
        for part in parts
    )
    return draw_picture(
        f"memory-{number}",
        draw,
        height=0.9 + 0.42 * len(parts),
        title=f"Where the bytes are: {label}",
        alt=f"Bytes by component of {label}: {whole} in all. "
        + "; ".join(f"{r[0]}: {r[3]} against {r[4]}" for r in rows),
        caption=(
            f"Bytes of the whole checkpoint, everything counted: {whole} in 16 bits"
            + (f", {share(saved)} smaller." if saved is not None else ".")
            + f" Shorter is better.{paper}"
        ),
        table=Table(("component", "parameters", "bits each", "as stored", "16 bit"), rows),
    )


def latency_pictures(speeds: Sequence[tuple[Sourced, Sequence[PolicySpeed]]]) -> list[Picture]:
    """One figure per policy that was timed: where the time of a chunk goes."""
    return [
        _latency(source, rows, number)
        for number, (source, rows) in enumerate(((s, r) for s, r in speeds if r), start=1)
    ]


def _latency(source: Sourced, rows: Sequence[PolicySpeed], number: int) -> Picture:
    parts = (("vision_ms", "vision"), ("prefix_ms", "prefix"), ("denoise_ms", "denoising"))
    names = [f"{row.precision}\n({row.kernel})" for row in rows]
    slowest = max(row.total_ms for row in rows)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, row in enumerate(rows):
            left = 0.0
            for colour, (key, _) in zip(SERIES, parts, strict=False):
                axes.barh(index, getattr(row, key), left=left, height=0.55, color=colour, zorder=2)
                left += getattr(row, key)
            _beside(axes, f"{row.total_ms:,.0f}", max(left, row.total_ms), index)
        _rows(axes, names)
        axes.set_xlim(0, max(slowest, 1e-9) * 1.2)
        axes.set_xlabel("milliseconds per action chunk")
        patches = part_of_matplotlib("patches")
        handles = [
            patches.Patch(color=colour, label=label)
            for colour, (_, label) in zip(SERIES, parts, strict=False)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)

    policy = rows[0].policy
    reference = next((row for row in rows if row.precision in ("fp32", "bf16")), None)
    ratios = [
        f"{row.precision} is {reference.total_ms / row.total_ms:.2g} times as fast as "
        f"{reference.precision}"
        for row in rows
        if reference is not None and row is not reference and row.total_ms > 0
    ]
    said = f" {'; '.join(ratios)}." if ratios else ""
    lines = tuple(
        (
            row.precision,
            row.kernel,
            *(f"{getattr(row, key):,.1f}" for key, _ in parts),
            f"{row.total_ms:,.1f}",
            MISSING if row.peak_rss_bytes is None else human_bytes(int(row.peak_rss_bytes)),
        )
        for row in rows
    )
    header = (
        "precision",
        "kernel",
        "vision ms",
        "prefix ms",
        "denoise ms",
        "chunk ms",
        "peak memory",
    )
    return draw_picture(
        f"latency-{number}",
        draw,
        height=0.95 + 0.5 * len(rows),
        title=f"Where the time goes: {policy}",
        alt=f"Milliseconds per action chunk of {policy} on {source.machine}. "
        + "; ".join(f"{line[0]}: {line[5]}" for line in lines),
        caption=(
            f"Medians of one action chunk on {source.machine}: image encoder, prompt and images "
            f"through the backbone (prefix), all denoising steps. Shorter is better.{said} Times "
            "of another machine are not comparable."
        ),
        table=Table(header, lines),
    )


def _offset(row: int, place: int, count: int) -> float:
    return row + (place - (count - 1) / 2) * min(0.34, 0.8 / count)


def _colour(place: int) -> str:
    return CONDITION_COLOURS[place % len(CONDITION_COLOURS)]


def _beside(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=-1)
    axes.set_axisbelow(True)


def _legend(figure: Any, conditions: Sequence[str]) -> None:
    lines = part_of_matplotlib("lines")
    handles = [
        lines.Line2D(
            [],
            [],
            linestyle="none",
            marker=MARKERS[place % len(MARKERS)],
            color=_colour(place),
            label=condition_words(condition),
        )
        for place, condition in enumerate(conditions)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False)
