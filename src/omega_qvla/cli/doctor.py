"""``doctor``: what works on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from omega_qvla.cli.options import Common, option, save

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Doctor(Common):
    """Say what works on this machine, and how to get the rest.

    Kernels are tried, optional packages imported, and the simulator draws a picture. What is not
    installed is no fault; the exit status is 1 where something that is installed does not work.
    """

    examples: ClassVar[tuple[str, ...]] = ("omega-qvla doctor", "omega-qvla doctor --disk /data")
    disk: Annotated[
        Path, option(metavar="DIR", help="where artifacts will go: its free space is shown")
    ] = Path(".")

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.machine import examine_machine
        from omega_qvla.report.table import Table
        from omega_qvla.results.summaries import Checkup

        with screen.bars() as bars:
            checks = examine_machine(self.disk, lambda done, total: bars("checking", done, total))
        found = Checkup(checks=checks, ok=all(check.state != "broken" for check in checks))
        rows = [(check.name, check.state, check.found) for check in checks]
        broken = sum(check.state == "broken" for check in checks)
        note = f"{broken} broken" if broken else "everything that is installed works"
        screen.table(Table(("what", "state", "found"), tuple(rows), (note,)))
        save(self.json, found.to_json())
        return 0 if found.ok else 1
