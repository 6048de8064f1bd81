"""What the user sees: lines, tables and progress bars."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from omega_qvla.report.table import Table as TextTable
from omega_qvla.report.table import human_bytes
from omega_qvla.results.memory import Memory

if TYPE_CHECKING:
    from omega_qvla.calibration.observations import Observations

_PLAIN_WIDTH = 160


class _Console(Console):
    """A console that leaves a closed pipe to ``entry.py``, which says what is kept."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")


def screen_of(stream: IO[str] | None = None) -> Screen:
    """What the user sees, on standard output unless another stream is given."""
    return Screen(_console(stream))


def _console(stream: IO[str] | None = None) -> Console:
    """A terminal as wide as it is; files and pipes get lines long enough for a table."""
    console = _Console(file=stream, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


@dataclass
class Screen:
    """Output: bars on a terminal, plain lines elsewhere."""

    console: Console = field(default_factory=_console)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def report(self, observations: Observations) -> None:
        """What was taken from a source of observations and what was left out."""
        for line in [] if observations.report is None else observations.report.lines():
            self.say(line)

    def decisions(self, decisions: Mapping[str, str]) -> None:
        """What was decided about a checkpoint, a line each."""
        for question, answer in decisions.items():
            self.say(f"{question}: {answer}")

    def table(self, content: TextTable, *, without: Sequence[str] = ()) -> None:
        """A table, less some columns, and its notes; a line per row where it is too wide."""
        kept = [i for i, name in enumerate(content.header) if name not in without]
        header = [content.header[i] for i in kept]
        rows = [[row[i] for i in kept] for row in content.rows]
        table = Table()
        for number, name in enumerate(header):
            table.add_column(name, overflow="fold", no_wrap=number == 0)
        for row in rows:
            table.add_row(*row)
        unlimited = self.console.options.update_width(10_000)
        if self.console.measure(table, options=unlimited).minimum <= self.console.width:
            self.console.print(table)
        else:
            for row in rows:
                cells = zip(header[1:], row[1:], strict=True)
                self.say(f"{row[0]}: {', '.join(f'{name} {cell}' for name, cell in cells)}")
        for note in content.notes:
            self.say(note)

    def memory(self, found: Memory, title: str) -> None:
        """The memory table of ``inspect``."""
        table = Table("component", "parameters", "bits each", "bytes", "16-bit bytes", title=title)
        for row in found.components:
            table.add_row(
                row.name,
                f"{row.params:,}",
                "–" if not row.params else f"{row.bits:.2f}",
                human_bytes(row.bytes),
                human_bytes(row.reference_bytes),
            )
        table.add_section()
        whole = human_bytes(found.total_bytes), human_bytes(found.reference_bytes)
        table.add_row("whole checkpoint", "", "", *whole)
        self.console.print(table)
        self.say(f"whole checkpoint {found.reduction:.1%} smaller than in 16 bits")
        narrow = found.paper_scope_reduction
        if narrow is not None:
            self.say(f"the paper's count (linears of backbone and action head only): {narrow:.1%}")

    def bar(self, label: str, shares: Sequence[float] | None = None) -> SingleBar:
        """A progress bar for one loop; ``shares``: of the work done before each of its items."""
        return SingleBar(self, label, shares)

    def bars(self) -> Bars:
        """Progress bars that appear as (label, done, total) reports come in."""
        return Bars(self)


class Bars(AbstractContextManager["Bars"]):
    """Called with (label, done, total); a bar per label, or a line per tenth without a terminal."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[times]}"),
            console=screen.console,
            disable=not screen.console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}
        self._paces: dict[str, Pace] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int, share: float | None = None) -> None:
        """``share``: the part of the work that is done, where things differ in cost."""
        share = done / max(total, 1) if share is None else share
        times = self._paces.setdefault(label, Pace()).text(share)
        if self._screen.console.is_terminal:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total, times=times)
            self._bars.update(self._tasks[label], completed=done, times=times)
            return
        tenth = 10 * done // max(total, 1)
        if tenth != self._tenths.get(label):
            self._tenths[label] = tenth
            self._screen.say(f"{label}: {done}/{total}{', ' if times else ''}{times}")


class Pace:
    """What is left, judged by the last few reports: what was done before comes in all at once."""

    def __init__(self, clock: Callable[[], float] = monotonic, reports: int = 12) -> None:
        self._clock, self._begin = clock, clock()
        self._reports: deque[tuple[float, float]] = deque(maxlen=reports)

    def text(self, share: float) -> str:
        """Time used and left, as soon as that takes minutes; empty before."""
        now = self._clock()
        self._reports.append((now, share))
        (then, before), elapsed = self._reports[0], now - self._begin
        if elapsed < 60 or share <= before:
            return ""
        left = (now - then) * (1.0 - share) / (share - before)
        return f"{elapsed / 60:.0f} min elapsed, about {left / 60:.0f} min left"


class SingleBar(AbstractContextManager[Callable[[int, int, str], None]]):
    """The bar of one loop, called with (done, total, what)."""

    def __init__(self, screen: Screen, label: str, shares: Sequence[float] | None) -> None:
        self._bars, self._label, self._shares = Bars(screen), label, shares

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._bars.__enter__()
        return self._report

    def _report(self, done: int, total: int, _what: str) -> None:
        share = None if self._shares is None else self._shares[done]
        self._bars(self._label, done, total, share)

    def __exit__(self, *exit_info: object) -> None:
        self._bars.__exit__(*exit_info)
