"""openpi's websocket protocol in front of the core.

As openpi's own server does (``serving/websocket_policy_server.py``), this one sends a metadata map
first and then answers one binary message with another; ``/healthz`` answers over plain HTTP.  What
it does differently:

* it listens on loopback unless told otherwise; the token is compared during the HTTP handshake,
  before a byte of any message is read, and pages in a browser (which send ``Origin``) are refused;
* an error is a *text* message, which openpi's client raises, with JSON inside: ``{"error": code,
  "message", "request_id"}``.  The connection stays open and the next request is served; nothing of
  the server's insides is in it;
* everything has a bound: bytes of a message, bytes of unfinished messages and of unanswered ones,
  each of all clients together, seconds for a message to arrive, connections, connections that have
  not said anything yet (all of these in ``door.py``), requests on their way per connection;
* every reply says which artifact computed it and how old the observation was.

Replies leave in the order of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from omega_qvla.errors import ServingError
from omega_qvla.serving.server.backlog import Inbox
from omega_qvla.serving.server.door import (
    ConnectionClosed,
    Door,
    GuardedConnection,
    HttpRequest,
    Listening,
    Response,
    ServerConnection,
    guarded,
)
from omega_qvla.serving.server.protocol_server import (
    Pending,
    drain,
    error_fields,
    facts,
    metadata,
    status,
)
from omega_qvla.serving.server.scheduler import Core, Outcome, Reply
from omega_qvla.serving.wire import decode_map, encode
from omega_qvla.serving.wire.specification import parse_request


class WebsocketFront:
    """Serves a core to robots that speak openpi's protocol.

    Args:
        core: started.
        listening: where.
    """

    def __init__(self, core: Core, listening: Listening) -> None:
        self._core, self._listening = core, listening
        self._door = Door(core, listening)
        self._underway = 0
        self._metadata = b""
        core.metrics.gauge("connections", lambda: float(self._door.opened))
        core.metrics.gauge("waiting_bytes", lambda: float(self._door.backlog.held))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Serve until ``stop`` is set, then drain; see ``Front``.

        Raises:
            OSError: the address cannot be used.
        """
        core, listening = self._core, self._listening
        self._metadata = encode(metadata(core))  # complete only after the warm-up
        async with guarded(self._door, self._talk, self._admit) as port:
            ready(port)
            await stop.wait()
            return await drain(core, listening.drain_s, lambda: self._underway)

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health and metrics over HTTP; a websocket for who may have one."""
        shown = request.headers.get_all("Authorization")
        answer = status(self._core, self._listening.token, request.path, shown)
        if answer is not None:
            return connection.respond(*answer)
        if self._core.draining:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "draining\n")
        if self._door.opened >= self._listening.connections:
            self._core.metrics.count("connections_total", "event", "too_many")
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again\n"
            )
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        """Serve one client until it is gone."""
        core = self._core
        guest = cast(GuardedConnection, connection).guest
        self._door.opens(guest)
        core.metrics.count("connections_total", "event", "opened")
        answers: asyncio.Queue[_Answer] = asyncio.Queue(self._listening.pipeline)
        writer = asyncio.create_task(self._write(connection, answers))
        try:
            await connection.send(self._metadata)
            async for token in connection:
                answer = _Answer(core.clock())
                self._underway += 1
                await answers.put(answer)
                self._accept(connection, guest.inbox, answer, text=isinstance(token, str))
        except ConnectionClosed:
            pass
        finally:
            writer.cancel()
            core.withdraw(connection)
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await writer
            while not answers.empty():
                answers.get_nowait()
                self._underway -= 1

    def _accept(
        self, client: ServerConnection, inbox: Inbox, answer: _Answer, *, text: bool
    ) -> None:
        """Read the oldest message; ``text`` says that it was sent as a text."""
        message = self._door.backlog.take(inbox)
        if message is None:
            return
        answer.release = lambda: self._door.backlog.done(inbox, message)
        try:
            if message.refusal is not None:
                raise message.refusal
            if text:
                raise ServingError("malformed", "requests are binary messages, this one is text")
            decoded = decode_map(message.data, self._listening.bounds)
            answer.request_id = decoded.get("request_id")
            request = parse_request(decoded, self._core.specification)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            explained = self._core.explain(error)
            self._core.count(explained)
            answer.settle(explained)
            return
        finally:
            message.data = b""  # a request has copies of its own; they count until it is answered
        self._core.submit(client, request, answer.deliver)

    async def _write(self, connection: ServerConnection, answers: asyncio.Queue[_Answer]) -> None:
        """Send the answers in the order of the requests."""
        previous_s: float | None = None
        while True:
            answer = await answers.get()
            try:
                outcome = await answer.future
                if isinstance(outcome, Reply):
                    await connection.send(encode(_reply(outcome, previous_s)))
                    self._door.turn_over()
                else:
                    await connection.send(_error_text(outcome, answer.request_id))
                previous_s = self._core.clock() - answer.arrived
            finally:
                self._underway -= 1


class _Answer(Pending):
    """The place of one answer in the order of a connection."""

    def __init__(self, arrived: float) -> None:
        super().__init__()
        self.arrived = arrived
        self.request_id: Any = None
        self.release: Callable[[], None] = _nothing_held

    def settle(self, outcome: Outcome) -> None:
        """Known: what the message held is free."""
        self.release()
        super().settle(outcome)


def _nothing_held() -> None:
    pass


def _reply(reply: Reply, previous_s: float | None) -> dict[str, Any]:
    told = facts(reply)
    if previous_s is not None:
        told["server_timing"]["prev_total_ms"] = 1e3 * previous_s
    return {"actions": reply.actions, **told}


def _error_text(error: ServingError, request_id: Any) -> str:
    """An error as a text message."""
    return json.dumps(error_fields(error, request_id))
