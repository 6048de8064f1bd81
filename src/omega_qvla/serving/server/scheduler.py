"""The server without its sockets: one thread computes, everybody else waits in a queue.

A protocol's server (``protocols/``) parses a request and calls ``submit``; the answer comes back
through ``deliver``, once, as a ``Reply`` or a ``ServingError``.  One thread takes what waits, up to
a batch, computes it in one pass, takes the next batch from the queue, checks the actions and
delivers.  In that order: a robot that hears its answer asks again at once, and must not find the
queue full of requests whose turn has come.  Nothing that happens to one request reaches another: an
observation that the policy refuses, a chunk that breaks a rule, a client that is gone are that
client's own, and a batch that fails is computed again one by one.

``age`` is the time from when the observation was made (as far as the client says, else from its
arrival) to when the reply is ready.
"""

from __future__ import annotations

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
from omega_qvla.serving.server.request_queue import (
    YIELDS_S,
    Outcome,
    PendingRequest,
    Reply,
    RequestQueue,
)
from omega_qvla.serving.server.safety import ActionLimits, UnsafeActionError
from omega_qvla.serving.wire.specification import Request, Specification

Array = npt.NDArray[np.float32]
Log = Callable[..., None]
"""Called as ``log(event, **fields)``; fields are JSON values."""

_DEADLINE_CHUNKS, _SHORTEST_DEADLINE_S = 4.0, 1.0
MOST_WAITING = 256
"""As many robots as may be connected (``Listening``): deadlines are what bounds the queue."""
_DRAINING = ServingError("draining", "the server is shutting down; connect to another one")


@dataclass(frozen=True)
class BatchingConfig:
    """Who waits, for how long, and how many are computed at a time.

    Attributes:
        batch: observations in one forward pass at most.
        waiting: clients that may wait, as far as their deadlines can be kept.
        deadline_s: how old an observation may be when its actions leave; None: four times the
            longest batch of the warm-up, and at least a second.
        yields_s: for how long a place in a full queue is given up to a newcomer.
    """

    batch: int = 8
    waiting: int = MOST_WAITING
    deadline_s: float | None = None
    yields_s: float = YIELDS_S


_Ready = tuple[PendingRequest, Any, Array]
"""Request, encoded observation and noise."""


@dataclass(frozen=True)
class _Computed:
    """What became of a request, before it leaves: a chunk or an error, and where the time went."""

    pending: PendingRequest
    outcome: Array | ServingError
    start: float = 0.0
    inference_s: float = 0.0
    batch: int = 0


class BatchScheduler:
    """Answers requests one batch after the other.

    Args:
        engine: computes.
        specification: of the requests.
        limits: of the actions.
        artifact: content hash, in every reply; None in full precision.
        identity: what else clients are told of the policy.
        generator: draws the noise where a request brings none.
        batching, log, clock: see their types; ``clock`` gives monotonic seconds.
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
        batching: BatchingConfig = BatchingConfig(),
        log: Log = lambda event, **fields: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.specification, self.limits, self.artifact = specification, limits, artifact
        self.identity, self.batching, self.clock, self.log = identity, batching, clock, log
        self.metrics = Metrics()
        self.metrics.gauge("waiting", lambda: float(self.waiting))
        self.deadline_s = batching.deadline_s or _SHORTEST_DEADLINE_S
        self._engine, self._generator = engine, generator
        self._queue = RequestQueue(batching.waiting, batching.yields_s)
        self._changed = threading.Condition()
        self._forecast = Forecast(batching.batch)
        self._draining = self._stopped = False
        self._running: tuple[int, float] | None = None
        self._numbered = 0
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is about to end."""
        return self._draining

    def warm_up(self, observation: Mapping[str, Any]) -> float:
        """Compute once alone and once in a full batch, and learn what a deadline can be.

        Returns:
            Seconds of the slower one.

        Raises:
            OmegaError: the policy does not work.
        """
        self._engine.prepare_thread()
        slowest = 0.0
        for size in (1, 1, self.batching.batch):
            start = self.clock()
            encoded = [self._engine.encode(observation) for _ in range(size)]
            self._engine.sample(encoded, [self._draw() for _ in range(size)])
            took = self.clock() - start
            slowest = max(slowest, took) if size > 1 else took
            self._forecast.record(size, took)
        if self.batching.deadline_s is None:
            self.deadline_s = max(_SHORTEST_DEADLINE_S, _DEADLINE_CHUNKS * slowest)
        return slowest

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(
        self, client: Hashable, request: Request, deliver: Callable[[Outcome], None]
    ) -> None:
        """Put a request into the queue; any thread may call this, and it never waits.

        ``deliver`` is called once, from this thread or from the computing one, and must not block.
        """
        now = self.clock()
        arrived = now - request.age_s
        allowed = self.deadline_s if request.deadline_s is None else request.deadline_s
        pending = PendingRequest(client, request, arrived, arrived + allowed, deliver)
        leaving = [(pending, _DRAINING)]
        with self._changed:
            if not self._draining:
                leaving = self._queue.offer(pending, now, lambda ahead: self._answered(ahead, now))
                self._changed.notify()
        for left, error in leaving:
            self._refuse(left, error)

    def withdraw(self, client: Hashable) -> None:
        """Forget a client that is gone."""
        with self._changed:
            forgotten = self._queue.withdraw(client)
        if forgotten:
            self.metrics.count("requests_total", "client_gone")

    def refused(self, error: Exception) -> ServingError:
        """Book a request that failed before it came here; what its client is told."""
        explained = self._explain(error)
        self.metrics.count("requests_total", explained.code)
        return explained

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
                lambda: not len(self._queue) and self._running is None,
                max(0.0, limit - self.clock()),
            )
            left = self._queue.clear()
            self._stopped = True
            self._changed.notify_all()
        for pending in left:
            self._refuse(pending, _DRAINING)
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
        batch: Sequence[PendingRequest] = ()
        while not self._stopped:
            computed = self._compute(batch)
            batch = self._next()
            self._deliver(computed)
            if not batch:
                self._rest()
                batch = self._next()
        for pending in batch:
            self._refuse(pending, _DRAINING)

    def _next(self) -> Sequence[PendingRequest]:
        """The next batch, out of the queue."""
        with self._changed:
            batch, expired = self._queue.take(self.batching.batch, self.clock())
            if batch:
                self._running = len(batch), self.clock()
        for pending, error in expired:
            self._refuse(pending, error)
        return batch

    def _rest(self) -> None:
        """Wait until there is something to do."""
        with self._changed:
            self._running = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._queue) or self._stopped)

    def _deliver(self, computed: Sequence[_Computed]) -> None:
        """The thread outlives whatever a server does with an answer."""
        for one in computed:
            outcome = self._judged(one)
            try:
                if isinstance(outcome, ServingError):
                    self._refuse(one.pending, outcome)
                else:
                    one.pending.deliver(outcome)
            except Exception as error:
                self.log("internal_error", error=f"{type(error).__name__}: {error}")

    def _compute(self, batch: Sequence[PendingRequest]) -> list[_Computed]:
        """One batch; each of its requests gets a chunk or an error, whatever happens."""
        start = self.clock()
        ready: list[_Ready] = []
        computed: list[_Computed] = []
        for pending in batch:
            try:
                request = pending.request
                drawn = self._draw() if request.noise is None else request.noise
                encoded = self._engine.encode(request.observation, request.left_over)
                ready.append((pending, encoded, drawn))
            except Exception as error:
                computed.append(_Computed(pending, self._explain(error)))
        return [*computed, *self._sample(ready, start)] if ready else computed

    def _sample(self, ready: Sequence[_Ready], start: float) -> list[_Computed]:
        try:
            chunks = self._engine.sample([one for _, one, _ in ready], [one for *_, one in ready])
        except Exception as error:
            if len(ready) == 1:
                return [_Computed(ready[0][0], self._explain(error))]
            self.log("batch_failed", size=len(ready), error=f"{type(error).__name__}: {error}")
            return [done for one in ready for done in self._sample([one], self.clock())]
        size, inference_s = len(ready), self.clock() - start
        with self._changed:
            self._forecast.record(size, inference_s)
        self.metrics.observe("inference_seconds", inference_s)
        self.metrics.count("batches_total", str(size))
        return [
            _Computed(pending, chunk, start, inference_s, size)
            for (pending, _, _), chunk in zip(ready, chunks, strict=True)
        ]

    def _judged(self, computed: _Computed) -> Outcome:
        """What may leave."""
        pending, chunk = computed.pending, computed.outcome
        if isinstance(chunk, ServingError):
            return chunk
        try:
            self.limits.check(chunk)
        except Exception as error:
            if isinstance(error, UnsafeActionError):
                self.metrics.count("action_violations_total", error.violation)
            return self._explain(error)
        now = self.clock()
        if pending.expires <= now:
            return pending.stale(now)
        age_s = now - pending.arrived
        queue_s = computed.start - pending.arrived - pending.request.age_s
        self.metrics.count("requests_total", "answered")
        self.metrics.observe("queue_seconds", queue_s)
        self.metrics.observe("reply_seconds", age_s - pending.request.age_s)
        return Reply(
            np.asarray(chunk, np.float32),
            self._name(pending.request),
            self.artifact,
            age_s,
            queue_s,
            computed.inference_s,
            computed.batch,
        )

    def _refuse(self, pending: PendingRequest, error: ServingError) -> None:
        self.metrics.count("requests_total", error.code)
        pending.deliver(error)

    def _explain(self, error: Exception) -> ServingError:
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


def _is_memory(error: Exception) -> bool:
    """PyTorch reports a failed allocation as a plain RuntimeError."""
    if isinstance(error, MemoryError | ResourceError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
