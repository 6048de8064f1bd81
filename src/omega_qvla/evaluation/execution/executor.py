"""What the evaluation of rows needs of those who do its work, wherever they are.

An executor is handed jobs and says what happens to them.  It knows nothing of what becomes of the
answers; ``evaluate.py`` knows nothing of processes and machines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from omega_qvla.evaluation.execution.blueprint import Blueprint
from omega_qvla.evaluation.execution.plan import Plan, SweepRow
from omega_qvla.evaluation.rollout import Group


@dataclass(frozen=True)
class Job:
    """Build the policy of a row and measure it, or run some of its episodes.

    Attributes:
        plan: what is evaluated.
        row: whose policy it is.
        blueprint: how another process builds it; once it is built, without the long work.
        normalized: units in which the reference was measured; None: this row is one, and chooses.
        groups: the episodes; none: build and measure.
    """

    plan: Plan
    row: SweepRow
    blueprint: Blueprint | None
    normalized: bool | None = None
    groups: Sequence[Group] = ()

    @property
    def task(self) -> str | None:
        """Of the first episode."""
        return self.groups[0][0] if self.groups else None


@dataclass(frozen=True)
class Reply:
    """What the worker that has a job says (``worker.py``).

    ``{"progress": [label, done, total]}`` and ``{"record": …}`` of an episode come on the way;
    ``{"prepared": …}``, ``{"done": true}`` or ``{"error": {"kind", "message"}}`` end the job.
    """

    job: int
    message: Mapping[str, Any]

    @property
    def is_last(self) -> bool:
        """Whether the job ended with it."""
        return not ({"record", "progress"} & self.message.keys())


@dataclass(frozen=True)
class Death:
    """The worker that had the job is gone, and what it had not reported is lost."""

    job: int
    cause: str


class Executor(Protocol):
    """Workers, here or elsewhere."""

    description: str
    """A line for the user; empty if there is nothing to say."""
    seeds_per_job: int | None
    """Episodes of one task in a job, which loads policy and scenes once; None: all of a row."""

    def start(self, number: int, job: Job) -> None:
        """Have a job carried out as soon as a worker is free; never waits.

        Args:
            number: of the job; one that was reported dead may be started again.
        """
        ...

    def wait(self, hear: Callable[[Reply | Death], None]) -> None:
        """Wait until something happens to any of the started jobs, and tell it."""
        ...

    def close(self) -> None:
        """End the workers; what they are doing is lost."""
        ...


class JobQueue:
    """Jobs that wait for a worker; each takes what costs it the least to begin."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Job]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, number: int, job: Job) -> None:
        """Add a job at the end."""
        self._waiting.append((number, job))

    def take(self, label: str | None, task: str | None) -> tuple[int, Job]:
        """The first job of the row and task given, of the row alone, or of all."""
        labels = [job.row.label for _, job in self._waiting]
        chosen = label if label in labels else labels[0]
        places = [place for place, one in enumerate(labels) if one == chosen]
        tasks = [self._waiting[place][1].task for place in places]
        place = places[tasks.index(task) if task in tasks else 0]
        found = self._waiting[place]
        del self._waiting[place]
        return found

    def clear(self) -> None:
        """Forget them all."""
        self._waiting.clear()
