"""Which requests may wait, and for how long: pure bookkeeping, no threads and no clock.

A robot wants actions for what it sees *now*.  Four rules follow:

* **newest per client**: a request replaces an earlier one of the same client that still waits, and
  keeps its place in the line;
* **within its deadline**: a request is let in where its answer is expected before its deadline
  (``forecast.py``), and where the line has a place.  Robots that ask one thing at a time are thus
  refused only when there are more of them than can be served in time;
* **fresh**: where there is no room, a newcomer takes the place of a request that has come just
  before, of the oldest of those.  The more robots ask, the younger is what is computed; whoever has
  waited longer than that moment keeps the place, and newcomers are refused at once.  So nobody
  hears late that there was no room;
* **deadlines**: what has waited past its deadline is answered with an error, never computed.

Times are seconds of one monotonic clock, passed in by the caller.
"""

from __future__ import annotations

import math
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


Leaving = tuple[Ticket[Content, Answer], ServingError]
"""A request that leaves the line without actions, and why."""


def _at_once(_: int) -> float:
    return -math.inf


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
        self,
        ticket: Ticket[Content, Answer],
        now: float,
        answered: Callable[[int], float] = _at_once,
    ) -> list[Leaving[Content, Answer]]:
        """Put a request into the line; returns the requests that leave it for that, and why.

        Args:
            ticket: the request.
            now: the time.
            answered: when a request behind so many waiting ones would be answered.
        """
        leaving = self._expired(now)
        if ticket.expires <= now:
            return [*leaving, (ticket, stale(ticket, now))]
        since = now
        replaced = self._line.get(ticket.client)
        if replaced is not None:
            error = ServingError("superseded", "a newer observation of the same client took over")
            leaving.append((replaced.ticket, error))
            since = replaced.since
        elif (refusal := self._refusal(ticket, answered, len(self._line))) is not None:
            given_up = self._youngest_elder(now)
            in_its_place = self._refusal(ticket, answered, len(self._line) - 1)
            if given_up is None or in_its_place is not None:
                return [*leaving, (ticket, refusal)]
            leaving.append((given_up, refusal))
            del self._line[given_up.client]
        self._line[ticket.client] = _Waiting(ticket, since)
        return leaving

    def take(
        self, limit: int, now: float
    ) -> tuple[list[Ticket[Content, Answer]], list[Leaving[Content, Answer]]]:
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

    def _youngest_elder(self, now: float) -> Ticket[Content, Answer] | None:
        """Of the requests that came just now the oldest: who gives way to a newcomer."""
        young = (one for one in self._line.values() if now - one.since < self._yields_s)
        oldest = min(young, key=lambda one: one.since, default=None)
        return None if oldest is None else oldest.ticket

    def _refusal(
        self, ticket: Ticket[Content, Answer], answered: Callable[[int], float], ahead: int
    ) -> ServingError | None:
        """Why a request cannot be the next behind so many others, or None."""
        if ahead >= self._places:
            text = f"{self._places} other requests wait; try again, or serve fewer robots"
            return ServingError("overloaded", text)
        late_s = answered(ahead) - ticket.expires
        if late_s <= 0:
            return None
        return ServingError(
            "overloaded",
            f"behind {ahead} others the answer would come {1e3 * late_s:.0f} ms after its "
            "deadline; try again, allow more, or serve fewer robots",
        )

    def _expired(self, now: float) -> list[Leaving[Content, Answer]]:
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
