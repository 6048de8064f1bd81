"""When the next connection may come in, so that who is served already does not feel it.

To let a connection in costs the event loop about a millisecond (its transport, its tasks, its
timers, its handshake), and the thread that computes actions as long, since both need Python's lock.
Where nobody is served that is nobody's loss, and a token bucket keeps the rest in order.  Where
chunks are computed, one newcomer comes in with each of them, or with every 50 ms of a long one: no
chunk takes longer by more than a newcomer or three per cent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

_QUIET_S = 0.1
"""Nobody is served when nothing has been computed for so long."""
_LONGEST_S = 0.05
"""After which a newcomer comes in, whatever is computed."""


class Arrivals(Protocol):
    """Says who may come in."""

    def take(self) -> bool:
        """Whether one connection may come in now; if so, it does."""
        ...

    @property
    def wait_s(self) -> float:
        """Seconds from the last ``take`` until it is worth asking again."""
        ...


class Pace:
    """A token bucket.

    Args:
        rate: tokens per second.
        burst: tokens that it holds at most, and at first.
        clock: in seconds; never goes back.

    Raises:
        ValueError: a rate that is not positive, or a bucket that holds no token.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        if not (rate > 0 and burst >= 1):
            raise ValueError(f"a pace needs a rate above 0 and a burst from 1 on: {rate}, {burst}")
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._since = float(burst), clock()

    def take(self) -> bool:
        """One token, if there is one."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + self._rate * (now - self._since))
        self._since = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    @property
    def wait_s(self) -> float:
        """Seconds from the last ``take`` until there is a token."""
        return max(0.0, (1 - self._tokens) / self._rate)


class Turnstile:
    """A pace, and where chunks are computed one newcomer for each of them.

    Args:
        pace: of all that come in.
        turn: chunks computed so far, and seconds since one was being computed (0 while one is).
        clock: in seconds; never goes back.
    """

    def __init__(
        self, pace: Pace, turn: Callable[[], tuple[int, float]], clock: Callable[[], float]
    ) -> None:
        self._pace, self._turn, self._clock = pace, turn, clock
        self._last = -1
        self._since = clock()
        self._wait_s = 0.0

    def take(self) -> bool:
        """Whether one connection may come in now; if so, it does."""
        now = self._clock()
        turn, quiet_s = self._turn()
        passed = now - self._since
        if quiet_s < _QUIET_S and turn == self._last and passed < _LONGEST_S:
            self._wait_s = _LONGEST_S - passed
            return False
        if not self._pace.take():
            self._wait_s = self._pace.wait_s
            return False
        self._last, self._since = turn, now
        return True

    @property
    def wait_s(self) -> float:
        """Seconds from the last ``take`` until one may come in, if no chunk ends before."""
        return self._wait_s
