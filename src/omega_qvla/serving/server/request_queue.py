"""Which requests may wait, and for how long: pure bookkeeping, no threads and no clock.

A robot wants actions for what it sees *now*.  Four rules follow:

* **newest per client**: a request replaces an earlier one of the same client that still waits, and
  keeps its place in the queue;
* **within its deadline**: a request is let in where its answer is expected before its deadline
  (``forecast.py``), and where the queue has a place.  Robots that ask one thing at a time are thus
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

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError
from omega_qvla.serving.wire.specification import Request

YIELDS_S = 0.04
"""Inside the 50 ms in which a refusal must have come."""


@dataclass(frozen=True)
class Reply:
    """Actions, and what a robot must know to judge them.

    Attributes:
        actions: [horizon, action_dim] float32, in the robot's units.
        request_id: the client's, or the server's own.
        artifact: content hash of the artifact that computed them; None in full precision.
        age_s: of the observation.
        queue_s, inference_s: where the time went.
        batch: observations in the forward pass.
    """

    actions: npt.NDArray[np.float32]
    request_id: str | int
    artifact: str | None
    age_s: float
    queue_s: float
    inference_s: float
    batch: int


Outcome = Reply | ServingError


@dataclass(frozen=True, eq=False)
class PendingRequest:
    """A request on its way.

    Attributes:
        client: who asked; one connection is one client.
        request: what for.
        arrived: when its observation was made, as far as the client says.
        expires: when its answer stops being of use.
        deliver: takes the outcome; called exactly once.
    """

    client: Hashable
    request: Request
    arrived: float
    expires: float
    deliver: Callable[[Outcome], None]

    def stale(self, now: float) -> ServingError:
        """The error for an answer that comes too late."""
        waited, allowed = (t - self.arrived for t in (now, self.expires))
        return ServingError(
            "stale",
            f"the observation arrived {1e3 * waited:.0f} ms ago, the deadline allows "
            f"{1e3 * max(allowed, 0.0):.0f} ms; allow more, or serve fewer robots",
        )


Leaving = tuple[PendingRequest, ServingError]
"""A request that leaves the queue without actions, and why."""


def _at_once(_: int) -> float:
    return -math.inf


class RequestQueue:
    """The waiting requests, one per client.

    Args:
        places: how many clients may wait.
        yields_s: for how long a place in a full queue is given up to a newcomer.
    """

    def __init__(self, places: int, yields_s: float = YIELDS_S) -> None:
        if places < 1:
            raise ValueError(f"a queue needs at least one place, got {places}")
        self._places, self._yields_s = places, yields_s
        self._waiting: dict[Hashable, PendingRequest] = {}
        self._since: dict[Hashable, float] = {}

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def offer(
        self, pending: PendingRequest, now: float, answered: Callable[[int], float] = _at_once
    ) -> list[Leaving]:
        """Put a request into the queue; returns the requests that leave it for that, and why.

        Args:
            pending: the request.
            now: the time.
            answered: when a request behind so many waiting ones would be answered.
        """
        leaving = self._expired(now)
        if pending.expires <= now:
            return [*leaving, (pending, pending.stale(now))]
        replaced = self._waiting.get(pending.client)
        if replaced is not None:
            error = ServingError("superseded", "a newer observation of the same client took over")
            leaving.append((replaced, error))
        elif (refusal := self._refusal(pending, answered, len(self._waiting))) is not None:
            given_up = self._oldest_newcomer(now)
            in_its_place = self._refusal(pending, answered, len(self._waiting) - 1)
            if given_up is None or in_its_place is not None:
                return [*leaving, (pending, refusal)]
            leaving.append((self._remove(given_up), refusal))
        self._waiting[pending.client] = pending
        self._since.setdefault(pending.client, now)
        return leaving

    def take(self, limit: int, now: float) -> tuple[list[PendingRequest], list[Leaving]]:
        """The next requests to compute, first come first served, and those whose time is over."""
        expired = self._expired(now)
        return [self._remove(client) for client in list(self._waiting)[:limit]], expired

    def withdraw(self, client: Hashable) -> bool:
        """Forget what a client that is gone waits for; returns whether there was something."""
        if client not in self._waiting:
            return False
        self._remove(client)
        return True

    def clear(self) -> list[PendingRequest]:
        """Empty the queue; returns what waited."""
        return [self._remove(client) for client in list(self._waiting)]

    def _remove(self, client: Hashable) -> PendingRequest:
        del self._since[client]
        return self._waiting.pop(client)

    def _oldest_newcomer(self, now: float) -> Hashable | None:
        """Of the clients that came just now the first: it gives way to the next."""
        young = [client for client in self._waiting if now - self._since[client] < self._yields_s]
        return min(young, key=lambda client: self._since[client], default=None)

    def _refusal(
        self, pending: PendingRequest, answered: Callable[[int], float], ahead: int
    ) -> ServingError | None:
        """Why a request cannot be the next behind so many others, or None."""
        if ahead >= self._places:
            text = f"{self._places} other requests wait; try again, or serve fewer robots"
            return ServingError("overloaded", text)
        late_s = answered(ahead) - pending.expires
        if late_s <= 0:
            return None
        return ServingError(
            "overloaded",
            f"behind {ahead} others the answer would come {1e3 * late_s:.0f} ms after its "
            "deadline; try again, allow more, or serve fewer robots",
        )

    def _expired(self, now: float) -> list[Leaving]:
        late = [one for one in self._waiting.values() if one.expires <= now]
        return [(self._remove(one.client), one.stale(now)) for one in late]
