"""``report``: saved results on a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from omega_qvla.cli.options import (
    Common,
    Positional,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.errors import OutputError
from omega_qvla.extras import require
from omega_qvla.report.document import write_report


@dataclass(frozen=True)
class Report(Common):
    """One HTML file, and the figures as PNG, from saved JSON alone."""

    runs: Positional[tuple[Path, ...]] = ()
    out: Annotated[Path, tyro.conf.arg(help="the HTML file; figures go beside it")] = Path(
        "report.html"
    )

    @property
    def files(self) -> list[Path]:
        return [*super().files, self.out]

    def run(self, screen: Screen) -> int:
        require("a report", "report", "matplotlib", "jinja2")
        if self.json is not None and self.json.resolve() in [run.resolve() for run in self.runs]:
            raise OutputError(f"{self.json} would be overwritten by its own report's summary")
        summary = write_report(self.runs, self.out, overwrite=self.overwrite)
        for note in summary.notes:
            screen.say(f"note: {note}")
        save(self.json, summary.to_json())
        screen.say(f"report {summary.report} and {len(summary.figures)} figures beside it")
        return 0
