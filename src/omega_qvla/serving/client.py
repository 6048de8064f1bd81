"""The robot's side: a policy at the other end of a socket, and a loop that acts at a fixed rate.

``RemotePolicy`` answers ``sample_actions`` as a policy in this process does, so everything that
evaluates policies evaluates a server.  It reconnects with growing pauses when the connection is
lost; an error that the server explains is raised as it is and not tried again, because an
observation grows old while one tries.

``drive`` is the loop: it acts at every tick while the next chunk is being computed, merges chunks
as they arrive (``action_queue.py``), and reports how old the executed observations were, how evenly
the ticks came, and how often it was late.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError, WireError
from omega_qvla.extras import needing
from omega_qvla.serving.action_queue import DEFAULT_BLENDING, ActionQueue, Blending
from omega_qvla.serving.wire import DEFAULT_BOUNDS, decode_map, encode

with needing("a remote policy", "serve"):
    from websockets.exceptions import ConnectionClosed, WebSocketException
    from websockets.sync.client import ClientConnection, connect

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Patience:
    """How long a client tries.

    Attributes:
        reply_s: how long an answer may take.
        attempts: to connect, one after the other.
        first_pause_s, longest_pause_s: between attempts; each is twice the one before.
    """

    reply_s: float = 30.0
    attempts: int = 8
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int) -> float:
        """The pause after a failed attempt, counted from 0."""
        return min(self.first_pause_s * 2.0**attempt, self.longest_pause_s)


class RemotePolicy:
    """A policy behind openpi's websocket protocol.

    Args:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        token: what the server asks for, or None.
        patience: how long to try.
        sleep: waits for so many seconds.

    Attributes:
        metadata: what the server told about itself.
        reconnections: how often the connection had to be made again.

    Raises:
        ServingError: ``unreachable``.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        patience: Patience = Patience(),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address, self._patience, self._sleep = address, patience, sleep
        self._headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._open = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self.metadata: dict[str, Any] = {}
        self.reconnections = -1
        self._connect()

    def __enter__(self) -> RemotePolicy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
    ) -> npt.NDArray[np.float32]:
        """One chunk [horizon, action_dim], in the robot's units.

        Raises:
            ServingError: the server refused; ``unreachable`` or ``timeout``.
        """
        return self.infer(observation, noise=noise, deadline_ms=deadline_ms)["actions"]

    def infer(self, observation: Mapping[str, Any], **control: Any) -> dict[str, Any]:
        """The whole reply: ``actions``, ``artifact``, ``age_ms``, ``request_id``, timing.

        Args:
            observation: what the server's layout names; keys it does not know are refused.
            control: ``noise``, ``request_id``, ``deadline_ms``, ``age_ms``; None is left out.

        Raises:
            ServingError: see ``sample_actions``.
        """
        given = {key: value for key, value in control.items() if value is not None}
        if "noise" in given:
            given["noise"] = np.ascontiguousarray(given["noise"], np.float32)
        message = encode({**observation, **given})
        for again in (True, False):
            if self._connection is None:
                self._connect()
            try:
                return self._exchange(cast(ClientConnection, self._connection), message)
            except (ConnectionClosed, OSError) as error:
                self._disconnect()
                if not again:
                    raise ServingError("unreachable", f"{self._address}: {error}") from error
        raise AssertionError("unreachable code")

    def close(self) -> None:
        """End the connection."""
        self._disconnect()

    def _exchange(self, connection: ClientConnection, message: bytes) -> dict[str, Any]:
        connection.send(message)
        try:
            answer = connection.recv(self._patience.reply_s)
        except TimeoutError as error:
            self._disconnect()  # the late answer must not be taken for the next one's
            raise ServingError(
                "timeout", f"{self._address} did not answer within {self._patience.reply_s:g} s"
            ) from error
        if isinstance(answer, str):
            raise _explained(answer)
        reply = decode_map(answer)
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2:
            raise WireError("the reply has no 'actions' [horizon, action_dim]")
        return reply

    def _connect(self) -> None:
        reason: Exception | None = None
        for attempt in range(self._patience.attempts):
            if attempt:
                self._sleep(self._patience.pause_s(attempt - 1))
            try:
                self._connection = self._open.enter_context(
                    connect(
                        self._address,
                        compression=None,
                        max_size=DEFAULT_BOUNDS.message_bytes,
                        additional_headers=self._headers,
                        open_timeout=self._patience.reply_s,
                    )
                )
                self.metadata = decode_map(
                    cast(bytes, self._connection.recv(self._patience.reply_s))
                )
                self.reconnections += 1
                return
            except (OSError, WebSocketException, TimeoutError) as error:
                reason = error
                self._disconnect()
        raise ServingError(
            "unreachable",
            f"{self._address} could not be reached in {self._patience.attempts} attempts: {reason}",
        ) from reason

    def _disconnect(self) -> None:
        self._connection = None
        with contextlib.suppress(OSError, WebSocketException):
            self._open.close()


def _explained(text: str) -> ServingError:
    """The server's own error."""
    try:
        content = json.loads(text)
        return ServingError(str(content["error"]), str(content["message"]))
    except (ValueError, TypeError, KeyError):
        return ServingError("internal", text[:500])


# --- the loop --------------------------------------------------------------------------------


class Robot(Protocol):
    """What ``drive`` moves."""

    def observe(self) -> Mapping[str, Any]:
        """What the robot sees now."""
        ...

    def act(self, action: npt.NDArray[np.float32]) -> bool:
        """Carry out one action; whether the episode is over."""
        ...


class Asked(Protocol):
    """What ``drive`` asks for chunks."""

    def infer(self, observation: Mapping[str, Any], **control: Any) -> dict[str, Any]:
        """A reply with ``actions``."""
        ...


@dataclass
class DriveReport:
    """How a drive went.

    Attributes:
        ticks: executed.
        finished: whether the robot said that the episode is over.
        late: ticks without a planned action.
        slowed: actions brought closer to the one before.
        chunks: received.
        ages_ms: per tick with a planned action, how old its observation was.
        periods_ms: between one tick and the next.
        errors: what the server refused, by code.
        stopped: why the robot stopped early, or None.
    """

    ticks: int = 0
    finished: bool = False
    late: int = 0
    slowed: int = 0
    chunks: int = 0
    ages_ms: list[float] = field(default_factory=list[float], repr=False)
    periods_ms: list[float] = field(default_factory=list[float], repr=False)
    errors: Counter[str] = field(default_factory=Counter[str])
    stopped: str | None = None

    def summary(self) -> dict[str, Any]:
        """Counts, and p50 and p99 of age and jitter (deviation from the median period)."""
        periods = np.asarray(self.periods_ms or [0.0])
        jitter = np.abs(periods - np.median(periods))
        figures = {"age_ms": np.asarray(self.ages_ms or [0.0]), "jitter_ms": jitter}
        return {
            "ticks": self.ticks,
            "finished": self.finished,
            "late": self.late,
            "slowed": self.slowed,
            "chunks": self.chunks,
            "errors": dict(self.errors),
            "stopped": self.stopped,
            **{
                f"{name}_{label}": float(np.quantile(values, share))
                for name, values in figures.items()
                for label, share in (("p50", 0.5), ("p99", 0.99))
            },
        }


def drive(
    robot: Robot,
    policy: Asked,
    *,
    rate_hz: float,
    ticks: int,
    ask_below: int,
    blending: Blending = DEFAULT_BLENDING,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> DriveReport:
    """Act at a fixed rate while chunks are computed.

    The first chunk is waited for; time counts from then on.

    Args:
        robot: observed and moved from this thread only.
        policy: asked from another thread, one request at a time.
        rate_hz: ticks per second.
        ticks: at most so many.
        ask_below: a new chunk is asked for when fewer planned actions than this are left.
        blending: how chunks follow each other and what happens when one is late.
        clock, sleep: monotonic seconds, and waiting for some.

    Raises:
        ServingError: the first chunk did not come.
    """
    queue, report, period = ActionQueue(blending), DriveReport(), 1.0 / rate_hz
    seen_at: dict[int, float] = {}
    with ThreadPoolExecutor(1, "policy") as asking:
        seen_at[0] = clock()
        asked: tuple[int, Future[dict[str, Any]]] | None = None
        queue.merge(asking.submit(policy.infer, robot.observe()).result()["actions"], 0, 0)
        report.chunks += 1
        begun = previous = clock()
        for tick in range(ticks):
            sleep(max(0.0, begun + tick * period - clock()))
            now = clock()
            if tick:
                report.periods_ms.append(1e3 * (now - previous))
            previous = now
            if asked is not None and asked[1].done():
                _receive(asked, queue, tick, report)
                asked = None
            if asked is None and queue.left(tick) < ask_below:
                seen_at[tick] = clock()
                asked = (tick, asking.submit(policy.infer, robot.observe()))
            try:
                action, observed = queue.next(tick)
            except ServingError as error:
                report.stopped = str(error)
                break
            if observed is not None:
                report.ages_ms.append(1e3 * (clock() - seen_at[observed]))
            report.ticks += 1
            if robot.act(action):
                report.finished = True
                break
    report.late, report.slowed = queue.late, queue.slowed
    return report


def _receive(
    asked: tuple[int, Future[dict[str, Any]]], queue: ActionQueue, tick: int, report: DriveReport
) -> None:
    observed, answer = asked
    try:
        queue.merge(answer.result()["actions"], observed, tick)
        report.chunks += 1
    except ServingError as error:
        report.errors[error.code] += 1
