"""The robot's side: a policy at the other end of a socket, and a loop that acts at a fixed rate.

``RemotePolicy`` answers ``sample_actions`` as a policy in this process does, so everything that
evaluates policies evaluates a server.  It reconnects with growing pauses when the connection is
lost, as long as the observation's deadline allows; an error that the server explains is raised as
it is and not tried again, because an observation grows old while one tries.  What keeps answers and
observations together is in ``session.py``.

``drive`` is the loop: it acts at every tick while the next chunk is being computed, merges chunks
as they arrive (``action_queue.py``), and reports how old the executed observations were, how evenly
the ticks came, and how often it was late.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError
from omega_qvla.serving.client.action_queue import DEFAULT_BLENDING, ActionQueue, Blending
from omega_qvla.serving.client.session import DEFAULT_PATIENCE, Patience, Question, Server, Session
from omega_qvla.serving.wire.specification import CONTROL

Array = npt.NDArray[Any]


class RemotePolicy:
    """A policy behind openpi's websocket protocol.

    One thread asks at a time; another one that asks meanwhile is refused (``busy``), because it
    would wait with an observation that grows old.  Threads take a remote policy each.

    Args:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        token: what the server asks for, or None.
        patience: how long to try.
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
        patience: Patience = DEFAULT_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Api-Key {token}"}
        self._clock = clock
        self._name, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)
        self._session = Session(Server(address, headers, patience, clock, sleep))
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
    ) -> npt.NDArray[np.float32]:
        """One chunk [horizon, action_dim], in the robot's units.

        Raises:
            ServingError: see ``infer``.
        """
        return self.infer(observation, noise=noise, deadline_ms=deadline_ms)["actions"]

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        noise: Any = None,
        request_id: str | int | None = None,
        deadline_ms: float | None = None,
        age_ms: float | None = None,
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

    def infer(self, observation: Mapping[str, Any], *, age_ms: float) -> dict[str, Any]:
        """A reply with ``actions``; the observation is this old now."""
        ...

    def abandon(self) -> None:
        """Give up what another thread waits for, without waiting for it."""
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

    The first chunk is waited for; time counts from then on.  However the loop ends, it ends at
    once: a request that is still on its way is given up.

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
    with _asking(policy, clock) as ask:
        seen_at[0] = clock()
        asked: tuple[int, Future[dict[str, Any]]] | None = None
        queue.merge(ask(robot.observe(), seen_at[0]).result()["actions"], 0, 0)
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
                asked = (tick, ask(robot.observe(), seen_at[tick]))
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


@contextlib.contextmanager
def _asking(
    policy: Asked, clock: Callable[[], float]
) -> Generator[Callable[[Mapping[str, Any], float], Future[dict[str, Any]]]]:
    """Asks in threads that nobody waits for, and gives up what is on its way at the end."""
    answers: list[Future[dict[str, Any]]] = []

    def ask(observation: Mapping[str, Any], seen_at: float) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()

        def wait() -> None:
            try:
                answer.set_result(policy.infer(observation, age_ms=1e3 * (clock() - seen_at)))
            except BaseException as error:  # whatever it is, the loop hears of it
                answer.set_exception(error)

        answers[:] = [answer]
        threading.Thread(target=wait, name="policy", daemon=True).start()
        return answer

    try:
        yield ask
    finally:
        if any(not answer.done() for answer in answers):
            policy.abandon()


def _receive(
    asked: tuple[int, Future[dict[str, Any]]], queue: ActionQueue, tick: int, report: DriveReport
) -> None:
    observed, answer = asked
    try:
        queue.merge(answer.result()["actions"], observed, tick)
        report.chunks += 1
    except ServingError as error:
        report.errors[error.code] += 1
