"""Which requests may wait, and for how long: pure bookkeeping, no threads and no clock.

A robot wants actions for what it sees *now*.  Four rules follow:

* **newest per client**: a request replaces an earlier one of the same client that still waits, and
  keeps its place in the line;
* **bounded**: at most so many clients wait.  A long line would help nobody: with one batch running
  and at most one batch waiting, an admitted request is answered within two batches;
* **fresh**: where the line is full, a newcomer takes the place of a request that has come just
  before, of the oldest of those.  The more robots ask, the younger is what is computed; whoever has
  waited longer than that moment keeps the place, and newcomers are refused at once.  So nobody
  hears late that there was no room;
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

YIELDS_S = 0.04
"""Inside the 50 ms in which a refusal must have come."""


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


@dataclass(frozen=True)
class _Waiting(Generic[Content, Answer]):
    """A ticket and when its client came into the line."""

    ticket: Ticket[Content, Answer]
    since: float


class Admission(Generic[Content, Answer]):
    """The line of waiting requests.

    Args:
        places: how many clients may wait.
        yields_s: for how long a place in a full line is given up to a newcomer.
    """

    def __init__(self, places: int, yields_s: float = YIELDS_S) -> None:
        if places < 1:
            raise ValueError(f"a line needs at least one place, got {places}")
        self._places, self._yields_s = places, yields_s
        self._line: dict[Hashable, _Waiting[Content, Answer]] = {}

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._line)

    def offer(
        self, ticket: Ticket[Content, Answer], now: float
    ) -> list[tuple[Ticket[Content, Answer], ServingError]]:
        """Put a request into the line; returns the requests that leave it for that, and why."""
        leaving = self._expired(now)
        since = now
        replaced = self._line.get(ticket.client)
        if replaced is not None:
            error = ServingError("superseded", "a newer observation of the same client took over")
            leaving.append((replaced.ticket, error))
            since = replaced.since
        elif len(self._line) >= self._places:
            young = (one for one in self._line.values() if now - one.since < self._yields_s)
            given_up = min(young, key=lambda one: one.since, default=None)
            leaving.append((given_up.ticket if given_up else ticket, self._full()))
            if given_up is None:
                return leaving
            del self._line[given_up.ticket.client]
        self._line[ticket.client] = _Waiting(ticket, since)
        return leaving

    def take(
        self, limit: int, now: float
    ) -> tuple[list[Ticket[Content, Answer]], list[tuple[Ticket[Content, Answer], ServingError]]]:
        """The next requests to compute, first come first served, and those whose time is over."""
        expired = self._expired(now)
        clients = list(self._line)[:limit]
        return [self._line.pop(client).ticket for client in clients], expired

    def withdraw(self, client: Hashable) -> bool:
        """Forget what a client that is gone waits for; returns whether there was something."""
        return self._line.pop(client, None) is not None

    def clear(self) -> list[Ticket[Content, Answer]]:
        """Empty the line; returns what waited."""
        waiting = [one.ticket for one in self._line.values()]
        self._line.clear()
        return waiting

    def _full(self) -> ServingError:
        text = f"{self._places} other requests wait; try again, or serve fewer robots"
        return ServingError("overloaded", text)

    def _expired(self, now: float) -> list[tuple[Ticket[Content, Answer], ServingError]]:
        waiting = [one.ticket for one in self._line.values()]
        late = [ticket for ticket in waiting if ticket.expires <= now]
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
