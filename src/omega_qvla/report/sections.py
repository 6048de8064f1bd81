"""The parts of a report: the question each one answers, how to read it, and what was measured.

What was not measured is said where its figures would be, with the command that would measure it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omega_qvla.report.comparison_pictures import (
    error_pictures,
    latency_pictures,
    memory_pictures,
    success_pictures,
)
from omega_qvla.report.motion_pictures import films_of, scenes_of, track_picture
from omega_qvla.report.pictures import Picture
from omega_qvla.report.site_pictures import (
    diagnostics_name,
    error_map,
    error_span,
    outlier_picture,
    range_picture,
)
from omega_qvla.report.sources import Sources
from omega_qvla.report.table import Table, results_table
from omega_qvla.report.words import condition_words, quantity
from omega_qvla.results.diagnostics import Film
from omega_qvla.results.speed import KernelSummary

_NOT_DIAGNOSED = "not looked into: run `omega-qvla diagnose` and add its JSON"

_ERROR = (
    "Action error is the squared difference of the action chunk from full precision, over its"
    " square, on held-out observations with the same noise; down and left is better. The "
    "noise floor is how far apart two chunks of full precision are that differ in their noise"
    " alone: an error well below it disappears in the policy's own spread."
)
_SITES = (
    "Squared error of a site's output relative to full precision, on a log scale that all "
    "maps share; dark is good. Above, the site alone, fed with full precision's own input: "
    "what it adds. Below, the same place inside the quantized policy: what has arrived, "
    "errors of all sites before it included."
)
_RANGES = (
    "Inputs of the action head's sites on a log scale, the median layer as a line and all "
    "layers as a band. The closer the largest value lies to the root mean square, the better "
    "4 bits hold both. Dashed is the largest magnitude that the static scale of a step "
    "represents; what lies above it is clipped, on purpose: that lowers the error of all "
    "other values."
)
_OUTLIERS = (
    "Largest magnitude of every input channel, at the sites of each component that have the "
    "worst outliers; neighbouring channels share a bin, which shows the largest. A 4-bit grid"
    " has to reach the peak, so flat is good."
)
_PATHS = (
    "The hand of the robot from the same start and with the same noise. A dot is success, a "
    "cross failure. Small differences grow, because a policy that is a little elsewhere sees "
    "other images: a path need not be the same to be as good."
)


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name, title: anchor and heading.
        text: the question that the part answers.
        reading: how to read its figures, and what is good.
        pictures, tables: what was measured.
        films: (caption, film).
        gap: what to say where nothing was measured.
    """

    name: str
    title: str
    text: str
    gap: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[tuple[str, Table]] = ()
    films: Sequence[tuple[str, Film]] = ()
    reading: str = ""

    @property
    def empty(self) -> bool:
        """Whether only the gap is left to show."""
        return not (self.pictures or self.tables or self.films)


def sections_of(sources: Sources) -> list[Section]:
    """All parts in the order of reading, the empty ones included."""
    found = sources.diagnostics
    span = error_span(found)
    ranges = [range_picture(one, number) for number, one in enumerate(found, start=1)]
    outliers = [outlier_picture(one, number) for number, one in enumerate(found, start=1)]
    memories = [
        *sources.memories,
        *((diagnostics_name(one), one.memory) for one in found if one.memory is not None),
    ]
    scenes = scenes_of(found)
    rows = quantity(len(sources.results), "row")
    results = [(f"All {rows} of the results", results_table(sources.results))]
    kernels = [
        (f"{source.file}: {source.machine}", _kernel_table(rows))
        for source, rows in sources.kernel_speeds
        if rows
    ]
    return [
        Section(
            "success",
            "Success",
            "Does the robot still do its job?",
            "not simulated in these files",
            success_pictures(sources.results),
            results if sources.results else (),
        ),
        Section(
            "error",
            "Action error and bytes",
            "How far are the actions from full precision, and what is saved?",
            "no action error of a quantized policy in these files",
            error_pictures(sources.results),
            reading=_ERROR,
        ),
        Section(
            "memory",
            "Memory",
            "Which part of the policy takes how much?",
            "no memory table in these files: add one of `omega-qvla inspect DIR --json FILE`",
            memory_pictures(memories),
        ),
        Section(
            "sites",
            "Error site by site",
            "Where in the network does the error come from?",
            _NOT_DIAGNOSED,
            [error_map(one, number, span) for number, one in enumerate(found, start=1)],
            reading=_SITES,
        ),
        Section(
            "ranges",
            "Activation range over denoising steps",
            "What do the integers have to hold while noise becomes actions?",
            _NOT_DIAGNOSED,
            [picture for picture in ranges if picture is not None],
            reading=_RANGES,
        ),
        Section(
            "outliers",
            "Outliers",
            "What does the transform do to channels that stand out?",
            _NOT_DIAGNOSED,
            [picture for picture in outliers if picture is not None],
            reading=_OUTLIERS,
        ),
        Section(
            "paths",
            "Trajectories",
            "Does the hand move as it did?",
            "no episodes recorded in these files: run `omega-qvla diagnose` with a simulator",
            [track_picture(scene, number) for number, scene in enumerate(scenes, start=1)],
            reading=_PATHS,
        ),
        Section(
            "film",
            "Film strip",
            "One episode, policy beside policy, from the first moment to the last.",
            "no pictures in these files: run `omega-qvla diagnose` with a simulator",
            films=[(_film_caption(condition, film), film) for condition, film in films_of(found)],
        ),
        Section(
            "latency",
            "Latency",
            "Where does the time of an action chunk go?",
            "not timed in these files: add `omega-qvla bench policy --json FILE`",
            latency_pictures(sources.policy_speeds),
            kernels,
        ),
    ]


def _kernel_table(rows: Sequence[KernelSummary]) -> Table:
    return Table(
        ("layers of", "GMAC/s", "vs torch fp32", "vs torch int8"),
        tuple(
            (row.site, f"{row.gmacs:.0f}", f"{row.vs_fp32:.1f}×", f"{row.vs_int8_dynamic:.2f}×")
            for row in rows
        ),
        ("times faster than the same layer there, medians; above 1 is better",),
    )


def _film_caption(condition: str, film: Film) -> str:
    outcome = "solved" if film.success else "not solved"
    return (
        f"{film.recipe}, {condition_words(condition)}: {film.task}, seed {film.seed}, {outcome} "
        f"after {film.frames[-1].step if film.frames else 0} steps"
    )
