"""The folder of a comparison: whose it is, what is in it, and what must not be lost.

A comparison is refused where results lie, unless it replaces them by name (``overwrite``) or goes
on with the same (``resume``).  What goes on must measure at least what is there: every row, with no
fewer episodes, observations and noises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from omega_qvla.errors import OutputError, ResultError
from omega_qvla.files import write_json
from omega_qvla.results.reading import load_as, load_comparison
from omega_qvla.results.rows import MadeBy, Row

RESULTS, MADE_BY = "results.json", "made-by.json"

Cell = tuple[str, str, str, str]
"""Policy, recipe, condition and scope: what a row of a comparison is of."""


@dataclass(frozen=True)
class Planned:
    """What a comparison is going to have.

    Attributes:
        cells: one row of each.
        episodes: of every row, all tasks together.
        noises: per held-out observation.
        held_out: observations; None: all there are.
    """

    cells: Sequence[Cell]
    episodes: int
    noises: int
    held_out: int | None = None

    def shortfall(self, row: Row) -> str | None:
        """What of a measured row would be lost, in words."""
        observations = len(row.action_errors or ())
        if row.cell not in self.cells:
            return "not measured by this command"
        if row.episodes > self.episodes:
            return f"{row.episodes} episodes, where this command runs {self.episodes}"
        if (row.noises or 0) > self.noises:
            return f"{row.noises} noises, where this command draws {self.noises}"
        if self.held_out is not None and observations > self.held_out:
            return f"{observations} held-out observations, where this command takes {self.held_out}"
        return None


def require_free_comparison(
    out: Path, planned: Planned, command: str, *, resume: bool, overwrite: bool
) -> None:
    """Refuse the folder of another comparison, unless it may be replaced or is continued.

    Args:
        planned: what the new comparison will have.
        command: what writes it; a demonstration may replace one.

    Raises:
        OutputError: names the rows, or the files, that would be lost.
    """
    if overwrite or not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is not a folder; give another `out`")
    there = sorted(path.name for path in out.iterdir())
    if resume:
        require_kept(out / RESULTS, planned)
    elif there and not (command == "demo" and _made_by(out) == "demo"):
        rows = measured_rows(out / RESULTS)
        what = _sentence(rows) if rows else f"{', '.join(there[:4])}, perhaps interrupted work"
        raise OutputError(
            f"{out} holds {what}; continue the same comparison with `resume=True`, replace it with "
            "`overwrite=True`, or give another `out`"
        )


def require_kept(path: Path, planned: Planned) -> None:
    """Refuse to replace a document by one that lacks some of what it has.

    Raises:
        OutputError: names the rows, and what of them would be lost.
    """
    lost: dict[str, list[Row]] = {}
    for row in measured_rows(path):
        if (reason := planned.shortfall(row)) is not None:
            lost.setdefault(reason, []).append(row)
    if lost:
        told = "; ".join(f"{_sentence(rows)} ({reason})" for reason, rows in lost.items())
        raise OutputError(
            f"{path} has what this command would lose: {told}. Name these recipes and conditions "
            "with as many episodes, observations and noises, replace it with `overwrite=True`, or "
            "give another `out`"
        )


def measured_rows(path: Path) -> list[Row]:
    """What a saved comparison has rows of; nothing where there is no file.

    Raises:
        OutputError: there is one that cannot be read, so nobody knows what would be lost.
    """
    if not path.exists():
        return []
    try:
        return load_comparison(path).rows
    except ResultError as error:
        raise OutputError(
            f"{error}; replace it with `overwrite=True`, or give another `out`"
        ) from error


def sign(out: Path, command: str) -> None:
    """Leave a note of what writes to a folder, before anything else is in it."""
    begun = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    note = MadeBy(command=command, begun=begun, library=version("omega-qvla"))
    write_json(note.to_json(), out / MADE_BY)


def _made_by(out: Path) -> str | None:
    try:
        return load_as(MadeBy, out / MADE_BY, "a comparison").command
    except ResultError:
        return None


def _sentence(rows: Iterable[Row]) -> str:
    found = list(rows)
    names = [f"{row.recipe} ({row.condition})" for row in found]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    policies = ", ".join(dict.fromkeys(row.policy for row in found))
    return f"{len(names)} row(s) of {policies}: {', '.join(names[:4])}{more}"
