"""openpi's websocket protocol in front of the scheduler.

As openpi's own server does (``serving/websocket_policy_server.py``), this one sends a metadata map
first and then answers one binary message with another; ``/healthz`` answers over plain HTTP.  What
it does differently:

* it listens on loopback unless told otherwise; the token is compared during the HTTP handshake,
  before a byte of any message is read, and pages in a browser (which send ``Origin``) are refused;
* an error is a *text* message, which openpi's client raises, with JSON inside: ``{"error": code,
  "message", "request_id"}``.  The connection stays open and the next request is served; nothing of
  the server's insides is in it;
* messages, connections and requests on their way are bounded (``websocket_listener.py``);
* every reply says which artifact computed it and how old the observation was.

Replies leave in the order of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from omega_qvla.errors import ServingError
from omega_qvla.extras import needing
from omega_qvla.serving.server.protocol_server import (
    Awaited,
    Listening,
    drain,
    error_fields,
    facts,
    metadata,
    status,
)
from omega_qvla.serving.server.request_queue import Reply
from omega_qvla.serving.server.scheduler import BatchScheduler
from omega_qvla.serving.server.websocket_listener import (
    HttpRequest,
    Response,
    ServerConnection,
    listen,
)
from omega_qvla.serving.wire import decode_map, encode
from omega_qvla.serving.wire.specification import parse_request

with needing("openpi's protocol", "serve"):
    from websockets.exceptions import ConnectionClosed


class OpenpiServer:
    """Serves a scheduler to robots that speak openpi's protocol.

    Args:
        scheduler: started.
        listening: where.
    """

    def __init__(self, scheduler: BatchScheduler, listening: Listening) -> None:
        self._scheduler, self._listening = scheduler, listening
        self._open = self._underway = 0
        self._metadata = b""
        scheduler.metrics.gauge("open_connections", lambda: float(self._open))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Serve until ``stop`` is set, then drain; see ``ProtocolServer``.

        Raises:
            OSError: the address cannot be used.
        """
        scheduler, listening = self._scheduler, self._listening
        self._metadata = encode(metadata(scheduler))  # complete only after the warm-up
        async with listen(scheduler, listening, self._talk, self._admit) as port:
            ready(port)
            await stop.wait()
            return await drain(scheduler, listening.drain_s, lambda: self._underway)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health and metrics over HTTP; a websocket for who may have one."""
        shown = request.headers.get_all("Authorization")
        answer = status(self._scheduler, self._listening.token, request.path, shown)
        if answer is not None:
            return connection.respond(*answer)
        if self._scheduler.draining:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "draining\n")
        if self._open >= self._listening.connections:
            self._scheduler.metrics.count("connections_total", "too_many")
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again\n"
            )
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """Serve one client until it is gone."""
        scheduler = self._scheduler
        scheduler.metrics.count("connections_total", "opened")
        self._open += 1
        answers: asyncio.Queue[_Answer] = asyncio.Queue(self._listening.pipeline)
        writer = asyncio.create_task(self._write(connection, answers))
        try:
            await connection.send(self._metadata)
            async for message in connection:
                answer = _Answer(scheduler.clock())
                self._underway += 1
                await answers.put(answer)
                self._accept(connection, message, answer)
        except ConnectionClosed:
            pass
        finally:
            self._open -= 1
            writer.cancel()
            scheduler.withdraw(connection)
            with contextlib.suppress(asyncio.CancelledError):
                await writer
            self._underway -= answers.qsize()

    def _accept(self, client: ServerConnection, message: str | bytes, answer: _Answer) -> None:
        """Read one message, and submit what it asks for."""
        try:
            if isinstance(message, str):
                raise ServingError("malformed", "requests are binary messages, this one is text")
            decoded = decode_map(message, self._listening.bounds)
            answer.request_id = decoded.get("request_id")
            request = parse_request(decoded, self._scheduler.specification)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            answer.deliver(self._scheduler.refused(error))
        else:
            self._scheduler.submit(client, request, answer.deliver)

    async def _write(self, connection: ServerConnection, answers: asyncio.Queue[_Answer]) -> None:
        """Send the answers in the order of the requests."""
        previous_s: float | None = None
        message: str | bytes
        while True:
            answer = await answers.get()
            try:
                outcome = await answer.future
                if isinstance(outcome, Reply):
                    message = encode(_reply(outcome, previous_s))
                else:
                    message = json.dumps(error_fields(outcome, answer.request_id))
                with contextlib.suppress(ConnectionClosed):  # its reader hears of that as well
                    await connection.send(message)
                previous_s = self._scheduler.clock() - answer.arrived
            finally:
                self._underway -= 1


class _Answer(Awaited):
    """The place of one answer in the order of a connection."""

    def __init__(self, arrived: float) -> None:
        super().__init__()
        self.arrived = arrived
        self.request_id: Any = None


def _reply(reply: Reply, previous_s: float | None) -> dict[str, Any]:
    told = facts(reply)
    if previous_s is not None:
        told["server_timing"]["prev_total_ms"] = 1e3 * previous_s
    return {"actions": reply.actions, **told}
