"""``report``: saved results on a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from omega_qvla.cli.options import (
    Common,
    Positional,
    option,
    save,
)
from omega_qvla.errors import OutputError
from omega_qvla.extras import require
from omega_qvla.recipe import DEFAULT_RECIPE

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Report(Common):
    """One HTML page from saved JSON alone."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla report out/demo/results.json",
        "omega-qvla report out/compare/results.json out/diagnostics.json --out out/report.html",
        "omega-qvla report out/compare/results.json --recipe gptq --figures out/figures",
    )
    runs: Positional[
        Annotated[tuple[Path, ...], option(metavar="FILE", help="JSON of any command, journals")]
    ] = ()
    out: Annotated[Path, option(metavar="FILE", help="the HTML file")] = Path("report.html")
    recipe: Annotated[
        str | None,
        option(
            metavar="NAME",
            help=f"what headline and numbers at the top are about; by default {DEFAULT_RECIPE}, "
            "or the first in the files",
        ),
    ] = None
    figures: Annotated[
        Path | None, option(metavar="DIR", help="write every figure there as PNG as well")
    ] = None

    @property
    def files(self) -> list[Path]:
        return [*super().files, self.out]

    def run(self, screen: Screen) -> int:
        require("a report", "report", "matplotlib", "jinja2")
        from omega_qvla.report.document import write_report

        if self.json is not None and self.json.resolve() in [run.resolve() for run in self.runs]:
            raise OutputError(f"{self.json} would be overwritten by its own report's summary")
        summary = write_report(
            self.runs,
            self.out,
            recipe=self.recipe,
            default=DEFAULT_RECIPE,
            figures=self.figures,
            overwrite=self.overwrite,
        )
        for note in summary.notes:
            screen.say(f"note: {note}")
        save(self.json, summary.to_json())
        screen.say(f"report {summary.report}")
        if self.figures is not None:
            screen.say(f"{len(summary.figures)} figures in {self.figures}")
        return 0
