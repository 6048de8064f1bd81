"""One HTML file from saved JSON, and its figures as PNG where they are asked for.

The page needs nothing but itself: figures are SVG in the text, pictures are data URIs, there is no
script, and a content-security policy forbids the browser to fetch anything.  It follows the
reader's light or dark scheme, is one column on a phone, and prints on white.  What was not measured
is said where its figure would be.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from omega_qvla.errors import OutputError, ResultError
from omega_qvla.extras import needing
from omega_qvla.files import write_file
from omega_qvla.report.sections import Section, sections_of
from omega_qvla.report.sources import Sources, read_sources
from omega_qvla.report.summary import Summary, summarise
from omega_qvla.results.summaries import ReportSummary

TEMPLATE = "report.html"


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    recipe: str | None = None,
    default: str | None = None,
    figures: str | Path | None = None,
    overwrite: bool = False,
) -> ReportSummary:
    """Read saved results and write the report.

    Args:
        runs: JSON files of any command, and journals of unfinished comparisons.
        out: the HTML file.
        recipe: what the words at its top are about; None: see ``default``.
        default: what they are about where it is there; else the first recipe that was quantized.
        figures: a folder for every figure as PNG, ``<name>-<figure>.png``; None writes none.
        overwrite: replace files that are there.

    Raises:
        OutputError: the page or one of its figures is there already, and not to be replaced.
        ResultError: a file cannot be used (all such files are named and nothing is written), there
            is nothing to report, or nothing of the recipe.
        ResourceError: an extra is not installed, or the report cannot be written.
    """
    target = Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ResultError(f"{target}: a report is an HTML file; give `out=NAME.html`")
    clashing = [str(run) for run in runs if Path(run).resolve() == target.resolve()]
    if clashing:
        raise ResultError(
            f"{clashing[0]} would be overwritten by its own report; give another `out`"
        )
    sources = read_sources(runs)
    summary = summarise(sources, recipe, default)
    sections = sections_of(sources)
    page = _render(sources, summary, sections).encode("utf-8")
    drawn: dict[Path, bytes] = {}
    if figures is not None:
        drawn = {
            Path(figures) / f"{target.stem}-{picture.name}.png": picture.png
            for section in sections
            for picture in section.pictures
        }
    there = [str(path) for path in (target, *drawn) if path.exists()]
    if there and not overwrite:
        raise OutputError(
            f"{there[0]} is there already{f' and {len(there) - 1} more' if there[1:] else ''}; "
            "give `overwrite=True` to replace them, or another `out`"
        )
    for path, png in drawn.items():
        write_file(path, png)
    write_file(target, page)
    return ReportSummary(
        report=str(target),
        bytes=len(page),
        figures=[str(path) for path in drawn],
        notes=sources.notes,
        gaps=[section.title for section in sections if section.empty],
        files=sources.files,
    )


def _render(sources: Sources, summary: Summary, sections: Sequence[Section]) -> str:
    with needing("a report", "report"):
        jinja2 = importlib.import_module("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        sections=sections,
        notes=sources.notes,
        files=sources.files,
        version=version("omega-qvla"),
    )
