"""Observations that stay where they are stored until they are asked for.

A calibration set is read more than once (to check it, to fingerprint it, to run it), and its images
may be far larger than what a policy makes of them.  ``Streamed`` therefore keeps, per observation,
only the SHA-256 of its content, from when it was first read; whenever it is asked for it is read
again and compared.  A source that changes in between is an error, not another calibration.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.errors import ObservationError
from omega_qvla.policies.base import Observation

_RECENT = 4
"""Observations kept after they were read: enough for ``o[0]["state"]`` after ``o[0]["images"]``."""


@dataclass(frozen=True)
class Skipped:
    """One observation that could not be read.

    Attributes:
        where: the file, relative to its source.
        place: what in the file, for instance ``episode 3, frame 120``.
        reason: what is wrong with it.
    """

    where: str
    place: str
    reason: str


@dataclass(frozen=True)
class SourceReport:
    """What was taken from a source, and what was left out.

    Attributes:
        summary: one line on what was taken.
        skipped: chosen but not readable.
        remarks: further lines, such as files that are not there.
        state: what the source calls the numbers of a state; empty where it does not say.
        noise: whether the observations are noise.
    """

    summary: str
    skipped: tuple[Skipped, ...] = ()
    remarks: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    noise: bool = False

    def lines(self) -> list[str]:
        """The report for a reader: unreadable places of one file share a line."""
        by_file: dict[str, list[Skipped]] = {}
        for skipped in self.skipped:
            by_file.setdefault(skipped.where, []).append(skipped)
        return [
            self.summary,
            *self.remarks,
            *(
                f"skipped {len(several)} in {where}: first {several[0].place}: {several[0].reason}"
                for where, several in by_file.items()
            ),
        ]


class Streamed(Sequence[Observation]):
    """A sequence of observations that are read on access.

    Args:
        read: gives observation ``number``; called again for every access that is not recent.
        digests: ``content_digest`` of each observation, from its first reading.
        numbers: which of them this sequence holds, in order; all of them when absent.
    """

    def __init__(
        self,
        read: Callable[[int], Observation],
        digests: Sequence[bytes],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._read, self._all = read, digests
        self._numbers = tuple(range(len(digests)) if numbers is None else numbers)
        self._recent: OrderedDict[int, Observation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Observation: ...
    @overload
    def __getitem__(self, index: slice) -> Streamed: ...
    def __getitem__(self, index: int | slice) -> Observation | Streamed:
        """One observation, or a view of some.

        Raises:
            ObservationError: the source is gone or no longer what it was.
        """
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        number = self._numbers[index]
        if number not in self._recent:
            self._recent[number] = self._read_same(number)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return self._recent[number]

    def __iter__(self) -> Iterator[Observation]:
        # Not by the protocol of __getitem__, which takes any IndexError of a reader for the end.
        return (self[i] for i in range(len(self)))

    def select(self, places: Sequence[int]) -> Streamed:
        """The observations at these places of this sequence; nothing is read."""
        return Streamed(self._read, self._all, [self._numbers[place] for place in places])

    @property
    def digests(self) -> list[bytes]:
        """SHA-256 of each observation, without reading them again."""
        return [self._all[number] for number in self._numbers]

    def _read_same(self, number: int) -> Observation:
        observation = self._read(number)
        if content_digest(observation) != self._all[number]:
            raise ObservationError(
                f"observation {number} is not what it was when it was first read: its files "
                "changed meanwhile; start again"
            )
        return observation
