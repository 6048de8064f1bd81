"""Which requests may wait, and for how long: pure bookkeeping, no threads and no clock.

A robot wants actions for what it sees *now*.  Three rules follow:

* **newest per client**: a request replaces an earlier one of the same client that still waits, and
  keeps its place in the line;
* **bounded**: when as many clients wait as the line has places, another one is refused at once.  A
  long line would help nobody: with one batch running and at most one batch waiting, an admitted
  request is answered within two batches;
* **deadlines**: what has waited past its deadline is answered with an error, never computed.

Times are seconds of one monotonic clock, passed in by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from omega_qvla.errors import ServingError

Content = TypeVar("Content")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Ticket(Generic[Content, Answer]):
    """A request on its way.

    Attributes:
        client: who asked; one connection is one client.
        content: the request.
        arrived: when it arrived.
        expires: when its answer stops being of use.
        deliver: takes the answer or the error; called exactly once.
    """

    client: Hashable
    content: Content
    arrived: float
    expires: float
    deliver: Callable[[Answer | ServingError], None]


class Admission(Generic[Content, Answer]):
    """The line of waiting requests.

    Args:
        places: how many clients may wait.
    """

    def __init__(self, places: int) -> None:
        if places < 1:
            raise ValueError(f"a line needs at least one place, got {places}")
        self._places = places
        self._line: dict[Hashable, Ticket[Content, Answer]] = {}

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._line)

    def offer(
        self, ticket: Ticket[Content, Answer], now: float
    ) -> list[tuple[Ticket[Content, Answer], ServingError]]:
        """Put a request into the line; returns the requests that leave it for that, and why."""
        leaving = self._expired(now)
        replaced = self._line.get(ticket.client)
        if replaced is not None:
            error = ServingError("superseded", "a newer observation of the same client took over")
            leaving.append((replaced, error))
        elif len(self._line) >= self._places:
            text = f"{self._places} requests wait already; try again, or serve fewer robots"
            return [*leaving, (ticket, ServingError("overloaded", text))]
        self._line[ticket.client] = ticket
        return leaving

    def take(
        self, limit: int, now: float
    ) -> tuple[list[Ticket[Content, Answer]], list[tuple[Ticket[Content, Answer], ServingError]]]:
        """The next requests to compute, first come first served, and those whose time is over."""
        expired = self._expired(now)
        clients = list(self._line)[:limit]
        return [self._line.pop(client) for client in clients], expired

    def withdraw(self, client: Hashable) -> bool:
        """Forget what a client that is gone waits for; returns whether there was something."""
        return self._line.pop(client, None) is not None

    def clear(self) -> list[Ticket[Content, Answer]]:
        """Empty the line; returns what waited."""
        waiting = list(self._line.values())
        self._line.clear()
        return waiting

    def _expired(self, now: float) -> list[tuple[Ticket[Content, Answer], ServingError]]:
        late = [ticket for ticket in self._line.values() if ticket.expires <= now]
        for ticket in late:
            del self._line[ticket.client]
        return [(ticket, stale(ticket, now)) for ticket in late]


def stale(ticket: Ticket[Content, Answer], now: float) -> ServingError:
    """The error for an answer that comes too late."""
    waited, allowed = (t - ticket.arrived for t in (now, ticket.expires))
    return ServingError(
        "stale",
        f"the observation arrived {1e3 * waited:.0f} ms ago, the deadline allows "
        f"{1e3 * max(allowed, 0.0):.0f} ms; allow more, or serve fewer robots",
    )
