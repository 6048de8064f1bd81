"""The server without its sockets: one thread computes, everybody else waits in line.

A front (``websocket.py``, ``gr00t.py``) parses a request and calls ``submit``; the answer comes
back through ``deliver``, once, as a ``Reply`` or a ``ServingError``.  One thread takes whatever
waits, up to a batch, computes it in one pass, takes the next batch from the line, checks the
actions and delivers.  In that order: a robot that hears its answer asks again at once, and must not
find the line full of requests whose turn has come.  Nothing that happens to one request reaches
another: an observation that the policy refuses, a chunk that breaks a rule, a client that is gone
are that client's own, and a batch that fails is computed again one by one.

``age`` is the time from when the observation was made (as far as the client says, else from its
arrival) to when the reply is ready.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import NonFiniteError, OmegaError, ResourceError, ServingError
from omega_qvla.serving.server.forecast import Forecast
from omega_qvla.serving.server.metrics import Metrics
from omega_qvla.serving.server.policy_engine import Engine
from omega_qvla.serving.server.request_queue import YIELDS_S, Admission, Ticket, stale
from omega_qvla.serving.server.safety import ActionLimits, UnsafeActionError
from omega_qvla.serving.wire.specification import Request, Specification

Array = npt.NDArray[np.float32]
Log = Callable[..., None]
"""Called as ``log(event, **fields)``; fields are JSON values."""

_DEADLINE_CHUNKS, _SHORTEST_DEADLINE_S = 4.0, 1.0
MOST_WAITING = 256
"""As many robots as may be connected (``door.Listening``): deadlines are what bounds the line."""


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

    actions: Array
    request_id: str | int
    artifact: str | None
    age_s: float
    queue_s: float
    inference_s: float
    batch: int


Outcome = Reply | ServingError
_Ticket = Ticket[Request, Reply]
_Ready = tuple[_Ticket, Any, Array]
"""Ticket, encoded observation and noise."""


@dataclass(frozen=True)
class _Computed:
    """What became of a request, before it leaves: a chunk or an error, and where the time went."""

    ticket: _Ticket
    outcome: Array | ServingError
    start: float = 0.0
    inference_s: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class Rules:
    """How a server answers.

    Attributes:
        batch: observations in one forward pass at most.
        waiting: clients that may wait, as far as their deadlines can be kept.
        deadline_s: how old an observation may be when its actions leave; None: four times the
            longest batch of the warm-up, and at least a second.
        yields_s: for how long a place in a full line is given up to a newcomer.
    """

    batch: int = 8
    waiting: int = MOST_WAITING
    deadline_s: float | None = None
    yields_s: float = YIELDS_S


class Core:
    """Answers requests one batch after the other.

    Args:
        engine: computes.
        specification: of the requests.
        limits: of the actions.
        artifact: content hash, in every reply; None in full precision.
        identity: what else clients are told of the policy.
        generator: draws the noise where a request brings none.
        rules, metrics, log, clock: see their types; ``clock`` gives monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        specification: Specification,
        limits: ActionLimits,
        *,
        artifact: str | None,
        generator: np.random.Generator,
        identity: Mapping[str, Any] = MappingProxyType({}),
        rules: Rules = Rules(),
        metrics: Metrics | None = None,
        log: Log = lambda event, **fields: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.specification, self.limits, self.artifact = specification, limits, artifact
        self.identity = identity
        self.rules, self.clock, self.log = rules, clock, log
        self.metrics = metrics or Metrics()
        self.metrics.gauge("waiting", lambda: float(self.waiting))
        self.deadline_s = rules.deadline_s or _SHORTEST_DEADLINE_S
        self._engine, self._generator = engine, generator
        self._line: Admission[Request, Reply] = Admission(rules.waiting, rules.yields_s)
        self._changed = threading.Condition()
        self._forecast = Forecast(rules.batch)
        self._draining = self._stopped = False
        self._running: tuple[int, float] | None = None
        self._turns, self._rested = 0, -math.inf
        self._numbered = 0
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is about to end."""
        return self._draining

    def turn(self) -> tuple[int, float]:
        """Batches computed so far, and seconds since one was (0 while one is); from any thread."""
        return self._turns, 0.0 if self._running else self.clock() - self._rested

    def warm_up(self, observation: Mapping[str, Any]) -> float:
        """Compute once alone and once in a full batch, and learn what a deadline can be.

        Returns:
            Seconds of the slower one.

        Raises:
            OmegaError: the policy does not work.
        """
        self._engine.prepare_thread()
        slowest = 0.0
        for size in (1, 1, self.rules.batch):
            start = self.clock()
            encoded = [self._engine.encode(observation) for _ in range(size)]
            self._engine.sample(encoded, [self._draw() for _ in range(size)])
            took = self.clock() - start
            slowest = max(slowest, took) if size > 1 else took
            self._forecast.record(size, took)
        if self.rules.deadline_s is None:
            self.deadline_s = max(_SHORTEST_DEADLINE_S, _DEADLINE_CHUNKS * slowest)
        return slowest

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(
        self, client: Hashable, request: Request, deliver: Callable[[Outcome], None]
    ) -> None:
        """Put a request into the line; any thread may call this, and it never waits.

        ``deliver`` is called once, from this thread or from the computing one, and must not block.
        """
        now = self.clock()
        arrived = now - request.age_s
        allowed = self.deadline_s if request.deadline_s is None else request.deadline_s
        ticket = Ticket(client, request, arrived, arrived + allowed, deliver)
        leaving = [(ticket, _DRAINING)]
        with self._changed:
            if not self._draining:
                leaving = self._line.offer(ticket, now, lambda ahead: self._answered(ahead, now))
                self._changed.notify()
        for left, error in leaving:
            self._refuse(left, error)

    def withdraw(self, client: Hashable) -> None:
        """Forget a client that is gone."""
        with self._changed:
            forgotten = self._line.withdraw(client)
        if forgotten:
            self.metrics.count("requests_total", "outcome", "client_gone")

    def count(self, error: ServingError) -> None:
        """Book a request that was refused before it came here."""
        self.metrics.count("requests_total", "outcome", error.code)

    def drain(self, seconds: float) -> bool:
        """Refuse what is new, finish what waits, as far as the time allows.

        Returns:
            Whether everything was finished; if not, what still waited was refused.
        """
        limit = self.clock() + seconds
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            finished = self._changed.wait_for(
                lambda: not len(self._line) and self._running is None,
                max(0.0, limit - self.clock()),
            )
            left = self._line.clear()
            self._stopped = True
            self._changed.notify_all()
        for ticket in left:
            self._refuse(ticket, _DRAINING)
        return finished

    def _answered(self, ahead: int, now: float) -> float:
        """When a request behind so many waiting ones is expected to be answered."""
        if self._running is None and not ahead:
            return now  # nobody else is served meanwhile, so it is computed and its time is seen
        begins = now
        if self._running is not None:
            size, started = self._running
            begins = max(now, started + self._forecast.seconds(size))
        return begins + self._forecast.wait_s(ahead)

    def _work(self) -> None:
        self._engine.prepare_thread()
        batch: Sequence[_Ticket] = ()
        while not self._stopped:
            computed = self._compute(batch)
            batch = self._next()
            self._deliver(computed)
            if not batch:
                self._rest()
                batch = self._next()
        for ticket in batch:
            self._refuse(ticket, _DRAINING)

    def _next(self) -> Sequence[_Ticket]:
        """The next batch, out of the line."""
        with self._changed:
            batch, expired = self._line.take(self.rules.batch, self.clock())
            if batch:
                self._running = len(batch), self.clock()
        for ticket, error in expired:
            self._refuse(ticket, error)
        return batch

    def _rest(self) -> None:
        """Wait until there is something to do."""
        with self._changed:
            self._running = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._line) or self._stopped)

    def _deliver(self, computed: Sequence[_Computed]) -> None:
        """The thread outlives whatever a front does with an answer."""
        for one in computed:
            outcome = self._judged(one)
            try:
                if isinstance(outcome, ServingError):
                    self._refuse(one.ticket, outcome)
                else:
                    one.ticket.deliver(outcome)
            except Exception as error:
                self.log("internal_error", error=f"{type(error).__name__}: {error}")

    def _compute(self, tickets: Sequence[_Ticket]) -> list[_Computed]:
        """One batch; each of its requests gets a chunk or an error, whatever happens."""
        start = self.clock()
        ready: list[_Ready] = []
        computed: list[_Computed] = []
        for ticket in tickets:
            try:
                noise = ticket.content.noise
                drawn = self._draw() if noise is None else noise
                ready.append((ticket, self._engine.encode(ticket.content.observation), drawn))
            except Exception as error:
                computed.append(_Computed(ticket, self.explain(error)))
        return [*computed, *self._sample(ready, start)] if ready else computed

    def _sample(self, ready: Sequence[_Ready], start: float) -> list[_Computed]:
        try:
            chunks = self._engine.sample([one for _, one, _ in ready], [one for *_, one in ready])
        except Exception as error:
            if len(ready) == 1:
                return [_Computed(ready[0][0], self.explain(error))]
            self.log("batch_failed", size=len(ready), error=f"{type(error).__name__}: {error}")
            return [done for one in ready for done in self._sample([one], self.clock())]
        self._turns += 1
        self._rested = self.clock()
        size, inference_s = len(ready), self._rested - start
        with self._changed:
            self._forecast.record(size, inference_s)
        self.metrics.observe("inference_seconds", inference_s)
        self.metrics.count("batches_total", "size", str(size))
        return [
            _Computed(ticket, chunk, start, inference_s, size)
            for (ticket, _, _), chunk in zip(ready, chunks, strict=True)
        ]

    def _judged(self, computed: _Computed) -> Outcome:
        """What may leave."""
        ticket, chunk = computed.ticket, computed.outcome
        if isinstance(chunk, ServingError):
            return chunk
        try:
            self.limits.check(chunk)
        except Exception as error:
            if isinstance(error, UnsafeActionError):
                self.metrics.count("action_violations_total", "rule", error.violation)
            return self.explain(error)
        now = self.clock()
        if ticket.expires <= now:
            return stale(ticket, now)
        age_s = now - ticket.arrived
        queue_s = computed.start - ticket.arrived - ticket.content.age_s
        self.metrics.count("requests_total", "outcome", "answered")
        self.metrics.observe("queue_seconds", queue_s)
        self.metrics.observe("reply_seconds", age_s - ticket.content.age_s)
        return Reply(
            np.asarray(chunk, np.float32),
            self._name(ticket.content),
            self.artifact,
            age_s,
            queue_s,
            computed.inference_s,
            computed.batch,
        )

    def _refuse(self, ticket: _Ticket, error: ServingError) -> None:
        self.count(error)
        ticket.deliver(error)

    def explain(self, error: Exception) -> ServingError:
        """What a client is told; of what was not foreseen, nothing but that it happened."""
        if isinstance(error, ServingError):  # its traceback would keep the whole message alive
            return ServingError(error.code, str(error))
        if isinstance(error, NonFiniteError):
            return ServingError("not_finite", str(error))
        if _is_memory(error):
            self.log("out_of_memory", error=str(error))
            return ServingError("out_of_memory", "the server has not enough memory for this")
        if isinstance(error, OmegaError):
            return ServingError("bad_request", str(error))
        self.log("internal_error", error=f"{type(error).__name__}: {error}")
        return ServingError("internal", "the server failed on this request; its log says how")

    def _draw(self) -> Array:
        return self._generator.standard_normal(self.specification.noise_shape, dtype=np.float32)

    def _name(self, request: Request) -> str | int:
        if request.request_id is not None:
            return request.request_id
        self._numbered += 1
        return f"server-{self._numbered}"


_DRAINING = ServingError("draining", "the server is shutting down; connect to another one")


def _is_memory(error: Exception) -> bool:
    """PyTorch reports a failed allocation as a plain RuntimeError."""
    if isinstance(error, MemoryError | ResourceError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
