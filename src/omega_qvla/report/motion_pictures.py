"""Figures of what the robot did: the path of its hand, policy beside policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omega_qvla.report.pictures import Picture, draw_picture
from omega_qvla.report.style import GREY, GRID, SERIES, part_of_matplotlib
from omega_qvla.report.table import MISSING, Table
from omega_qvla.report.words import condition_words, quantity
from omega_qvla.results.diagnostics import Diagnostics, Film, Track
from omega_qvla.results.rows import FULL_PRECISION


@dataclass(frozen=True)
class Scene:
    """Every policy's episodes of one task, on the same seeds, under one condition."""

    policy: str
    condition: str
    task: str
    tracks: tuple[Track, ...]

    @property
    def recipes(self) -> list[str]:
        """Full precision first."""
        names = list(dict.fromkeys(track.recipe for track in self.tracks))
        return sorted(names, key=lambda name: name not in FULL_PRECISION)


def scenes_of(all_found: Sequence[Diagnostics]) -> list[Scene]:
    """Episodes by condition and task; full precision, run for every diagnostics, counts once."""
    scenes: dict[tuple[str, str, str], dict[tuple[str, int], Track]] = {}
    for found in all_found:
        for track in [] if found.rollouts is None else found.rollouts.episodes:
            scene = scenes.setdefault((found.policy, found.condition, track.task), {})
            scene.setdefault((track.recipe, track.seed), track)
    return [Scene(*key, tuple(tracks.values())) for key, tracks in scenes.items()]


def films_of(all_found: Sequence[Diagnostics]) -> list[tuple[str, Film]]:
    """(condition, film) of all diagnostics, each once; full precision comes first."""
    films: dict[tuple[str, ...], tuple[str, Film]] = {}
    for found in all_found:
        for film in [] if found.rollouts is None else found.rollouts.films:
            key = (found.policy, found.condition, film.task, str(film.seed), film.recipe)
            films.setdefault(key, (found.condition, film))
    return [
        film
        for _, film in sorted(
            films.items(), key=lambda item: (item[0][:4], item[0][4] not in FULL_PRECISION)
        )
    ]


def track_picture(scene: Scene, number: int) -> Picture:
    """The hand from above, and its height over time."""
    colours = {
        recipe: GREY if recipe in FULL_PRECISION else SERIES[index % len(SERIES)]
        for index, recipe in enumerate(
            [
                *(r for r in scene.recipes if r not in FULL_PRECISION),
                *(r for r in scene.recipes if r in FULL_PRECISION),
            ]
        )
    }

    def draw(figure: Any) -> None:
        above, height = figure.subplots(1, 2)
        for track in scene.tracks:
            x, y, z = zip(*track.positions, strict=True)
            full = track.recipe in FULL_PRECISION
            style: dict[str, Any] = {
                "color": colours[track.recipe],
                "linewidth": 2.6 if full else 1.3,
                "zorder": 1 if full else 2,
            }
            above.plot(x, y, **style)
            height.plot(range(len(z)), z, **style)
            mark: dict[str, Any] = {
                "color": colours[track.recipe],
                "marker": "o" if track.success else "x",
                "markersize": 6.5,
                "markeredgewidth": 1.0 if track.success else 2.2,
                "zorder": 3,
            }
            above.plot(x[-1], y[-1], **mark)
            height.plot(len(z) - 1, z[-1], **mark)
            above.plot(x[0], y[0], color=GREY, marker="|", markersize=7, zorder=0)
        above.set_aspect("equal", adjustable="datalim")
        above.set_title("from above, m", fontsize=8.5)
        height.set_title("height, m", fontsize=8.5)
        height.set_xlabel("control step", fontsize=8)
        for panel in (above, height):
            panel.grid(color=GRID, linewidth=0.8)
            panel.set_axisbelow(True)
            panel.tick_params(labelsize=7)
            panel.locator_params(nbins=4)

        lines = part_of_matplotlib("lines")
        handles = [
            lines.Line2D([], [], color=colours[recipe], label=recipe, linewidth=2)
            for recipe in scene.recipes
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False)

    told = "; ".join(_outcome(track, scene) for track in scene.tracks)
    rows = tuple(_row(track, scene) for track in scene.tracks)
    return draw_picture(
        f"path-{number}",
        draw,
        height=2.5,
        title=f"{scene.task}, {condition_words(scene.condition)}",
        alt=f"Path of the hand in {scene.task}, {condition_words(scene.condition)}. {told}.",
        caption=f"{told}.",
        table=Table(
            ("recipe", "seed", "solved", "steps", "mean distance, mm", "largest, mm"), rows
        ),
    )


def _outcome(track: Track, scene: Scene) -> str:
    verb = "solved" if track.success else "not solved"
    seeds = len({other.seed for other in scene.tracks})
    seed = f", seed {track.seed}" if seeds > 1 else ""
    apart = _distances(track, scene)
    off = f", {sum(apart) / len(apart):.0f} mm from full precision on average" if apart else ""
    return f"{track.recipe}{seed}: {verb} after {quantity(track.steps, 'step')}{off}"


def _distances(track: Track, scene: Scene) -> list[float]:
    """Millimetres between the hand and full precision's at every step that both made."""
    full = [one for one in scene.tracks if one.recipe in FULL_PRECISION]
    reference = next((one for one in full if one.seed == track.seed), None)
    if reference is None or reference is track:
        return []
    pairs = zip(track.positions, reference.positions, strict=False)
    return [1000 * math.dist(ours, theirs) for ours, theirs in pairs]


def _row(track: Track, scene: Scene) -> tuple[str, ...]:
    apart = _distances(track, scene)
    mean = f"{sum(apart) / len(apart):.0f}" if apart else MISSING
    largest = f"{max(apart):.0f}" if apart else MISSING
    solved = "yes" if track.success else "no"
    return track.recipe, str(track.seed), solved, str(track.steps), mean, largest
