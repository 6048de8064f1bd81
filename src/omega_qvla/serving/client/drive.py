"""A loop that acts at a fixed rate while chunks are computed.

It acts at every tick while the next chunk is on its way, merges chunks as they arrive
(``action_queue.py``), and reports how old the executed observations were, how evenly the ticks
came, and how often it was late.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError
from omega_qvla.real_time_chunking import LeftOver
from omega_qvla.serving.client.action_queue import DEFAULT_BLENDING, ActionQueue, Blending


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

    def infer(
        self,
        observation: Mapping[str, Any],
        *,
        age_ms: float,
        previous: Any = None,
        delay: int | None = None,
    ) -> dict[str, Any]:
        """A reply with ``actions``; the observation is this old now.

        The last two are given only where the chunk is to continue another one.
        """
        ...

    def abandon(self) -> None:
        """Give up what another thread waits for, without waiting for it."""
        ...


_Ask = Callable[[Mapping[str, Any], float, "LeftOver | None"], Future[dict[str, Any]]]


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
        delays: of the chunks, ticks from observation to arrival.
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
    delays: list[int] = field(default_factory=list[int], repr=False)
    errors: Counter[str] = field(default_factory=Counter[str])
    stopped: str | None = None

    def summary(self) -> dict[str, Any]:
        """Counts, and p50 and p99 of age, delay and jitter (deviation from the median period)."""
        periods = np.asarray(self.periods_ms or [0.0])
        jitter = np.abs(periods - np.median(periods))
        figures = {
            "age_ms": np.asarray(self.ages_ms or [0.0]),
            "jitter_ms": jitter,
            "delay_ticks": np.asarray(self.delays or [0]),
        }
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
        ask_below: a new chunk is asked for when fewer planned actions than this are left; with
            ``Blending(continued=True)`` also earlier, where the last chunks took longer than that.
        blending: how chunks follow each other and what happens when one is late.
        clock: seconds, as ``time.monotonic`` gives them; another one for tests.
        sleep: waits that many seconds; another one for tests.

    Raises:
        ServingError: the first chunk did not come.
    """
    queue, report, period = ActionQueue(blending), DriveReport(), 1.0 / rate_hz
    seen_at: dict[int, float] = {}
    with _asking(policy, clock) as ask:
        seen_at[0] = clock()
        asked: tuple[int, Future[dict[str, Any]]] | None = None
        queue.merge(ask(robot.observe(), seen_at[0], None).result()["actions"], 0, 0)
        report.chunks += 1
        begun = previous = clock()
        queue.delays = [math.ceil((begun - seen_at[0]) * rate_hz)]  # nothing was carried out
        for tick in range(ticks):
            sleep(max(0.0, begun + tick * period - clock()))
            now = clock()
            if tick:
                report.periods_ms.append(1e3 * (now - previous))
            previous = now
            if asked is not None and asked[1].done():
                _receive(asked, queue, tick, report)
                asked = None
            if asked is None and queue.due(tick, ask_below):
                seen_at[tick] = clock()
                left_over = queue.to_continue(tick)
                asked = (tick, ask(robot.observe(), seen_at[tick], left_over))
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
    report.late, report.slowed, report.delays = queue.late, queue.slowed, queue.delays
    return report


@contextlib.contextmanager
def _asking(policy: Asked, clock: Callable[[], float]) -> Generator[_Ask]:
    """Asks in threads that nobody waits for, and gives up what is on its way at the end."""
    answers: list[Future[dict[str, Any]]] = []

    def ask(
        observation: Mapping[str, Any], seen_at: float, left_over: LeftOver | None
    ) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        given: dict[str, Any] = {}
        if left_over is not None:
            given = {"previous": left_over.actions, "delay": left_over.delay}

        def wait() -> None:
            try:
                answer.set_result(
                    policy.infer(observation, age_ms=1e3 * (clock() - seen_at), **given)
                )
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
