"""What a comparison needs of those who do its work, wherever they are.

A crew is handed jobs, each a request of ``work.py``, and hands back what happens to them.  It knows
nothing of rows and episodes; ``distributed.py`` knows nothing of processes and machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Reply:
    """A message of the worker that has the job."""

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


class Crew(Protocol):
    """Workers, here or elsewhere."""

    def start(self, job: int, request: Mapping[str, Any]) -> None:
        """Have a request carried out as soon as a worker is free; never waits.

        Args:
            job: a number for it; one that was reported dead may be started again.
        """
        ...

    def wait(self) -> Reply | Death:
        """The next thing that happens to any of the started jobs."""
        ...

    def close(self) -> None:
        """End the workers; what they are doing is lost."""
        ...
