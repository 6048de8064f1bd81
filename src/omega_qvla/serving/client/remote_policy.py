"""The robot's side: a policy at the other end of a socket.

``RemotePolicy`` answers ``sample_actions`` as a policy in this process does, so everything that
evaluates policies evaluates a server.  It reconnects with growing pauses when the connection is
lost, as long as the observation's deadline allows; an error that the server explains is raised as
it is and not tried again, because an observation grows old while one tries.  What keeps answers and
observations together is in ``session.py``.
"""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ObservationError, ServingError
from omega_qvla.real_time_chunking import LeftOver, left_over_of
from omega_qvla.serving.client.session import (
    DEFAULT_RETRY_POLICY,
    Question,
    RetryPolicy,
    Server,
    Session,
)
from omega_qvla.serving.wire.specification import CONTROL

Array = npt.NDArray[Any]


class RemotePolicy:
    """A policy behind openpi's websocket protocol.

    One thread asks at a time; another one that asks meanwhile is refused (``busy``), because it
    would wait with an observation that grows old.  Threads take a remote policy each.

    Args:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        token: what the server asks for, or None.
        retry_policy: how long to try.
        clock: monotonic seconds; ages and deadlines count by it.
        sleep: waits for so many seconds.

    Raises:
        ServingError: ``unreachable``.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        retry_policy: RetryPolicy = DEFAULT_RETRY_POLICY,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._clock = clock
        self._name, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._session = Session(Server(address, headers, retry_policy, clock, sleep))
        self._session.open()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server told about itself when it was first reached."""
        return self._session.metadata or {}

    @property
    def reconnections(self) -> int:
        """How often the connection had to be made again."""
        return self._session.connections - 1

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(horizon, width) of the noise that sampling starts from."""
        horizon, width = self.metadata["specification"]["noise_shape"]
        return int(horizon), int(width)

    def sample_actions(
        self,
        observation: Mapping[str, Any],
        noise: Any = None,
        *,
        deadline_ms: float | None = None,
        previous: Any = None,
        delay: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """One chunk [horizon, action_dim], in the robot's units.

        Raises:
            ServingError: see ``infer``.
        """
        reply = self.infer(
            observation, noise=noise, deadline_ms=deadline_ms, previous=previous, delay=delay
        )
        return reply["actions"]

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: Any = None,
        request_id: str | int | None = None,
        deadline_ms: float | None = None,
        age_ms: float | None = None,
        previous: Any = None,
        delay: int | None = None,
    ) -> dict[str, Any]:
        """The whole reply: ``actions``, ``artifact``, ``age_ms``, ``request_id``, timing.

        Args:
            observation: what the server's layout names; keys it does not know are refused.
            noise: what sampling starts from.
            request_id: comes back with the reply.  On the way each request has another name, which
                no other has.
            deadline_ms: how old the observation may be when its actions are here; None: what the
                server told.
            age_ms: how old it is now; 0 by default.
            previous: [T, action_dim], what is not carried out yet of the chunk before; the first
                action belongs to the moment of the observation.  The new chunk continues it.
            delay: how many of them will be carried out before the reply is here; with ``previous``.

        Returns:
            ``age_ms`` is counted by this client's clock, from the observation to the reply.

        Raises:
            ServingError: what the server refused; ``unreachable``, ``timeout``, ``stale`` (past the
                deadline, sent or not), ``bad_reply`` (no answer to this request), ``changed``
                (another policy is served now), ``busy``, ``abandoned``, ``closed``.
        """
        given = {
            "noise": noise,
            "request_id": request_id,
            "deadline_ms": deadline_ms,
            "age_ms": age_ms,
            "previous": previous,
            "delay": delay,
        }
        control = {
            key: observation.get(key) if value is None else value for key, value in given.items()
        }
        age_s = _seconds("age_ms", control["age_ms"])
        name = f"{self._name}-{next(self._numbers)}"
        noise = control["noise"]
        asked = Question(
            {key: value for key, value in observation.items() if key not in CONTROL},
            name,
            self._clock() - (age_s or 0.0),
            _seconds("deadline_ms", control["deadline_ms"]),
            None if noise is None else np.ascontiguousarray(noise, np.float32),
            _left_over(control["previous"], control["delay"]),
        )
        reply = self._session.ask(asked)
        wanted = control["request_id"]
        return {**reply, "request_id": name if wanted is None else wanted}

    def abandon(self) -> None:
        """Give up what another thread waits for, without waiting for it; its call fails.

        The next call has a connection of its own.
        """
        session = self._session
        self._session = session.successor()
        session.end(ServingError("abandoned", "another thread gave this request up"))

    def close(self) -> None:
        """End the connection; what another thread waits for fails, and so does whatever follows."""
        self._session.end(ServingError("closed", "this remote policy was closed"))


def _left_over(previous: Any, delay: Any) -> LeftOver | None:
    try:
        return left_over_of(previous, delay)
    except ObservationError as error:
        raise ServingError("bad_request", str(error)) from error


def _seconds(name: str, milliseconds: Any) -> float | None:
    """Of a number of milliseconds, or None."""
    if milliseconds is None:
        return None
    try:
        value = float(milliseconds)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 <= value < math.inf:
        text = f"'{name}' must be a number of milliseconds, 0 or more, found {milliseconds!r:.60}"
        raise ServingError("bad_request", text)
    return value / 1e3
