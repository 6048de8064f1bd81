"""One HTML file from saved JSON, and its figures as PNG beside it.

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
from omega_qvla.report.sections import Section, sections_of
from omega_qvla.report.sources import Sources, read_sources
from omega_qvla.report.summary import summarise
from omega_qvla.results.summaries import ReportSummary
from omega_qvla.results.writing import write_file

TEMPLATE = "report.html"


def write_report(
    runs: Sequence[str | Path], out: str | Path, *, overwrite: bool = False
) -> ReportSummary:
    """Read saved results and write the report.

    Args:
        runs: JSON files of any command, and journals of unfinished comparisons.
        out: the HTML file; figures are written beside it as ``<name>-<figure>.png``.
        overwrite: replace files that are there.

    Raises:
        OutputError: the page or one of its figures is there already, and not to be replaced.
        ResultError: a file cannot be used (all such files are named and nothing is written), there
            is nothing to report.
        ResourceError: an extra is not installed, or the report cannot be written.
    """
    target = Path(out)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ResultError(f"{target}: a report is an HTML file; give --out NAME.html")
    clashing = [str(run) for run in runs if Path(run).resolve() == target.resolve()]
    if clashing:
        raise ResultError(
            f"{clashing[0]} would be overwritten by its own report; give another --out"
        )
    sources = read_sources(runs)
    sections = sections_of(sources)
    page = _render(sources, sections).encode("utf-8")
    pictures = [picture for section in sections for picture in section.pictures]
    figures = [target.with_name(f"{target.stem}-{picture.name}.png") for picture in pictures]
    there = [str(path) for path in (target, *figures) if path.exists()]
    if there and not overwrite:
        raise OutputError(
            f"{there[0]} is there already{f' and {len(there) - 1} more' if there[1:] else ''}; "
            "give --overwrite to replace them, or another --out"
        )
    for path, picture in zip(figures, pictures, strict=True):
        write_file(path, picture.png)
    write_file(target, page)
    return ReportSummary(
        report=str(target),
        bytes=len(page),
        figures=[str(path) for path in figures],
        notes=sources.notes,
        gaps=[section.title for section in sections if section.empty],
        files=sources.files,
    )


def _render(sources: Sources, sections: Sequence[Section]) -> str:
    with needing("a report", "report"):
        jinja2 = importlib.import_module("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = summarise(sources)
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        sections=sections,
        notes=sources.notes,
        files=sources.files,
        version=version("omega-qvla"),
    )
