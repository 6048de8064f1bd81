"""What every front shares, whatever its protocol says and however it says it.

Health and metrics, what a client is told first and with every reply, an answer on its way from the
computing thread to an event loop, and the end of a service.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Protocol

from omega_qvla.errors import ServingError
from omega_qvla.serving.server.access import authorized
from omega_qvla.serving.server.scheduler import Core, Outcome, Reply
from omega_qvla.serving.wire.specification import MAX_REQUEST_ID_CHARACTERS

_FLUSH_S = 0.3
"""After the last answer is known: how long it may take to leave."""


class Front(Protocol):
    """A protocol in front of a core."""

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


class Pending:
    """An answer that one loop waits for and any thread may bring."""

    def __init__(self) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self.future: asyncio.Future[Outcome] = self._loop.create_future()

    def deliver(self, outcome: Outcome) -> None:
        """From any thread."""
        if threading.get_ident() == self._thread:  # refused at once: nobody has to be woken
            self.settle(outcome)
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self.settle, outcome)

    def settle(self, outcome: Outcome) -> None:
        """From the loop's own thread."""
        if not self.future.done():
            self.future.set_result(outcome)


async def drain(core: Core, seconds: float, underway: Callable[[], int]) -> bool:
    """Finish what is on its way, refuse what comes, let the answers leave.

    Args:
        core: what answers.
        seconds: how long what is on its way may take.
        underway: how many answers have not left yet.

    Returns:
        Whether everything was finished in time.
    """
    loop = asyncio.get_running_loop()
    core.log("draining", waiting=core.waiting)
    finished = await loop.run_in_executor(None, core.drain, seconds)
    flushed = loop.time() + _FLUSH_S
    while underway() and loop.time() < flushed:
        await asyncio.sleep(0.01)
    core.log("drained", finished=finished)
    return finished


def status(
    core: Core, token: bytes | None, path: str, shown: Sequence[str]
) -> tuple[HTTPStatus, str] | None:
    """What a plain HTTP request gets: health for everybody, metrics for who may ask.

    Args:
        core: what answers.
        token: what must be shown, or None.
        path: of the request.
        shown: its ``Authorization`` headers; more than one is as good as none.

    Returns:
        Status and text, or None where somebody authorized asks for something else.
    """
    if path == "/healthz":
        if core.draining:
            return HTTPStatus.SERVICE_UNAVAILABLE, "draining\n"
        return HTTPStatus.OK, "OK\n"
    if not authorized(shown[0] if len(shown) == 1 else None, token):
        core.metrics.count("connections_total", "event", "unauthorized")
        return (
            HTTPStatus.UNAUTHORIZED,
            "this server needs its token: Authorization: Api-Key ...\n",
        )
    if path == "/metrics":
        return HTTPStatus.OK, core.metrics.render()
    return None


def metadata(core: Core) -> dict[str, Any]:
    """What a client learns first."""
    return {
        "artifact": core.artifact,
        **core.identity,
        "library": version("omega-qvla"),
        "specification": core.specification.dump(),
        "action_limits": core.limits.dump(),
        "deadline_ms": 1e3 * core.deadline_s,
        "batch": core.rules.batch,
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
