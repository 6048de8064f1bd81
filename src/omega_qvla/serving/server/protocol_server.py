"""What every protocol's server shares, whatever it says and however.

Where it listens, health and metrics, what a client is told first and with every reply, an answer on
its way from the computing thread to an event loop, and the end of a service.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Protocol

from omega_qvla.errors import ServingError
from omega_qvla.serving.server.access import authorized
from omega_qvla.serving.server.request_queue import Outcome, Reply
from omega_qvla.serving.server.scheduler import BatchScheduler
from omega_qvla.serving.wire import DEFAULT_BOUNDS, Bounds
from omega_qvla.serving.wire.specification import MAX_REQUEST_ID_CHARACTERS

_FLUSH_S = 0.3
"""After the last answer is known: how long it may take to leave."""


@dataclass(frozen=True)
class Listening:
    """Where and how a server listens.

    Attributes:
        host, port: the address; port 0 lets the system choose.
        token: what clients must show, or None on loopback.
        tls: or None for plain TCP.
        bounds: of one message.
        connections: open at the same time at most.
        silent: connections that have not finished their handshake at most.
        handshake_s: how long a handshake may take.
        ping_s: between two pings, and how long the answer to one may take.
        pipeline: requests on their way per connection.
        drain_s: how long what is on its way may take at the end.
    """

    host: str = "127.0.0.1"
    port: int = 0
    token: bytes | None = None
    tls: ssl.SSLContext | None = None
    bounds: Bounds = DEFAULT_BOUNDS
    connections: int = 256
    silent: int = 64
    handshake_s: float = 5.0
    ping_s: float = 10.0
    pipeline: int = 4
    drain_s: float = 3.0


class ProtocolServer(Protocol):
    """A protocol in front of a scheduler."""

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Serve until ``stop`` is set, then drain.

        Args:
            stop: ends the service.
            ready: called with the port once connections are accepted.

        Returns:
            Whether everything that was on its way got its answer in time.

        Raises:
            OSError: the address cannot be used.
        """
        ...


class Awaited:
    """An outcome that one loop waits for and any thread may bring."""

    def __init__(self) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self.future: asyncio.Future[Outcome] = self._loop.create_future()

    def deliver(self, outcome: Outcome) -> None:
        """From any thread."""
        if threading.get_ident() == self._thread:  # refused at once: nobody has to be woken
            self._settle(outcome)
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self._settle, outcome)

    def _settle(self, outcome: Outcome) -> None:
        if not self.future.done():
            self.future.set_result(outcome)


async def drain(scheduler: BatchScheduler, seconds: float, underway: Callable[[], int]) -> bool:
    """Finish what is on its way, refuse what comes, let the answers leave.

    Args:
        scheduler: what answers.
        seconds: how long what is on its way may take.
        underway: how many answers have not left yet.

    Returns:
        Whether everything was finished in time.
    """
    loop = asyncio.get_running_loop()
    scheduler.log("draining", waiting=scheduler.waiting)
    finished = await loop.run_in_executor(None, scheduler.drain, seconds)
    flushed = loop.time() + _FLUSH_S
    while underway() and loop.time() < flushed:
        await asyncio.sleep(0.01)
    scheduler.log("drained", finished=finished)
    return finished


def status(
    scheduler: BatchScheduler, token: bytes | None, path: str, shown: Sequence[str]
) -> tuple[HTTPStatus, str] | None:
    """What a plain HTTP request gets: health for everybody, metrics for who may ask.

    Args:
        scheduler: what answers.
        token: what must be shown, or None.
        path: of the request.
        shown: its ``Authorization`` headers; more than one is as good as none.

    Returns:
        Status and text, or None where somebody authorized asks for something else.
    """
    if path == "/healthz":
        if scheduler.draining:
            return HTTPStatus.SERVICE_UNAVAILABLE, "draining\n"
        return HTTPStatus.OK, "OK\n"
    if not authorized(shown[0] if len(shown) == 1 else None, token):
        scheduler.metrics.count("connections_total", "unauthorized")
        return (
            HTTPStatus.UNAUTHORIZED,
            "this server needs its token: Authorization: Api-Key ...\n",
        )
    if path == "/metrics":
        return HTTPStatus.OK, scheduler.metrics.render()
    return None


def metadata(scheduler: BatchScheduler) -> dict[str, Any]:
    """What a client learns first."""
    pose = scheduler.specification.reset_pose
    return {
        # Where openpi's client of an ALOHA looks for it.
        **({"reset_pose": list(pose)} if pose else {}),
        "artifact": scheduler.artifact,
        **scheduler.identity,
        "library": version("omega-qvla"),
        "specification": scheduler.specification.dump(),
        "action_limits": scheduler.limits.dump(),
        "deadline_ms": 1e3 * scheduler.deadline_s,
        "batch": scheduler.batching.batch,
    }


def facts(reply: Reply) -> dict[str, Any]:
    """What a robot must know to judge the actions of a reply."""
    return {
        "server_timing": {"infer_ms": 1e3 * reply.inference_s, "queue_ms": 1e3 * reply.queue_s},
        "request_id": reply.request_id,
        "artifact": reply.artifact,
        "age_ms": 1e3 * reply.age_s,
        "batch": reply.batch,
    }


def error_fields(error: ServingError, request_id: Any) -> dict[str, Any]:
    """Code and text of an error; the request's name only if it is one."""
    named = isinstance(request_id, int | str)
    named = named and len(str(request_id)) <= MAX_REQUEST_ID_CHARACTERS
    return {
        "error": error.code,
        "message": str(error),
        "request_id": request_id if named else None,
    }
