"""openpi's websocket protocol in front of the core.

As openpi's own server does (``serving/websocket_policy_server.py``), this one sends a metadata map
first and then answers one binary message with another; ``/healthz`` answers over plain HTTP.  What
it does differently:

* it listens on loopback unless told otherwise; the token is compared during the HTTP handshake,
  before a byte of any message is read, and pages in a browser (which send ``Origin``) are refused;
* an error is a *text* message, which openpi's client raises, with JSON inside: ``{"error": code,
  "message", "request_id"}``.  The connection stays open and the next request is served; nothing of
  the server's insides is in it;
* everything has a bound: bytes of a message, bytes of unfinished messages of all clients together,
  seconds for a message to arrive, connections, connections that have not said anything yet (the
  oldest of them goes first), requests on their way per connection;
* every reply says which artifact computed it and how old the observation was.

Replies leave in the order of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, cast

from omega_qvla.errors import ResourceError, ServingError
from omega_qvla.serving.access import authorized
from omega_qvla.serving.core import Core, Outcome, Reply
from omega_qvla.serving.specification import parse_request
from omega_qvla.serving.wire import DEFAULT_BOUNDS, Bounds, decode_map, encode

try:
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.http11 import Request as HttpRequest
    from websockets.http11 import Response
except ImportError as error:
    raise ResourceError(
        "serving needs the package websockets: pip install 'omega-qvla[serve]'"
    ) from error


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
        handshake_s, message_s: how long a handshake and one message may take to arrive.
        unfinished_bytes: of incomplete messages, all connections together.
        pipeline: requests on their way per connection.
        drain_s: how long what is on its way may take at the end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: bytes | None = None
    tls: ssl.SSLContext | None = None
    bounds: Bounds = DEFAULT_BOUNDS
    connections: int = 256
    silent: int = 64
    handshake_s: float = 5.0
    message_s: float = 10.0
    unfinished_bytes: int = 256 << 20
    pipeline: int = 4
    drain_s: float = 3.0


@dataclass(eq=False)
class _Guest:
    """One connection's part in the common bounds."""

    abort: Callable[[], None]
    opened: bool = False
    unfinished: int = 0
    since: float = 0.0


class _Door:
    """The bounds that all connections share."""

    def __init__(self, core: Core, listening: Listening) -> None:
        self._core, self._listening = core, listening
        self.guests: dict[_Guest, None] = {}

    @property
    def opened(self) -> int:
        """Connections past their handshake."""
        return sum(guest.opened for guest in self.guests)

    def enter(self, guest: _Guest) -> None:
        """A connection came; if too many say nothing, the oldest of those goes."""
        self.guests[guest] = None
        silent = [other for other in self.guests if not other.opened]
        if len(silent) > self._listening.silent:
            self._close(silent[0], "silent")

    def leave(self, guest: _Guest) -> None:
        """A connection is gone."""
        self.guests.pop(guest, None)

    def received(self, guest: _Guest, count: int) -> None:
        """Bytes came that do not complete a message."""
        if not guest.unfinished:
            guest.since = self._core.clock()
        guest.unfinished += count
        held = sum(other.unfinished for other in self.guests)
        if held > self._listening.unfinished_bytes:
            self._close(guest, "unfinished_bytes")

    def sweep(self) -> None:
        """Close the connections whose message takes too long."""
        limit = self._core.clock() - self._listening.message_s
        for guest in list(self.guests):
            if guest.opened and guest.unfinished and guest.since < limit:
                self._close(guest, "slow_message")

    def _close(self, guest: _Guest, reason: str) -> None:
        self.leave(guest)
        self._core.metrics.count("connections_total", "event", reason)
        guest.abort()


class _GuardedConnection(ServerConnection):
    """A connection that reports what arrives to the door."""

    def __init__(self, door: _Door, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.door = door
        self.guest = _Guest(self._abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.door.enter(self.guest)

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self.guest)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.door.received(self.guest, len(data))
        super().data_received(data)

    def process_event(self, event: Any) -> None:
        self.guest.unfinished = 0
        super().process_event(event)

    def _abort(self) -> None:
        self.transport.abort()


class WebsocketFront:
    """Serves a core to robots that speak openpi's protocol.

    Args:
        core: started.
        listening: where.
    """

    def __init__(self, core: Core, listening: Listening) -> None:
        self._core, self._listening = core, listening
        self._door = _Door(core, listening)
        self._underway = 0
        self._metadata = b""
        core.metrics.gauge("connections", lambda: float(self._door.opened))

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
        listening = self._listening
        self._metadata = encode(metadata(self._core))  # complete only after the warm-up

        def connect(*arguments: Any, **options: Any) -> ServerConnection:
            return _GuardedConnection(self._door, *arguments, **options)

        server = await serve(
            self._talk,
            listening.host,
            listening.port,
            ssl=listening.tls,
            origins=[None],
            compression=None,
            max_size=listening.bounds.message_bytes,
            max_queue=listening.pipeline,
            open_timeout=listening.handshake_s,
            close_timeout=1.0,
            process_request=self._admit,
            server_header=None,
            logger=_quiet(self._core),
            create_connection=cast(Any, connect),
        )
        sweeper = asyncio.create_task(self._sweep())
        try:
            ready(server.sockets[0].getsockname()[1])
            await stop.wait()
            return await self._drain()
        finally:
            sweeper.cancel()
            server.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.wait_closed(), 1.0)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._door.sweep()

    async def _drain(self) -> bool:
        """Finish what is on its way, refuse what comes, let the answers leave."""
        loop, core = asyncio.get_running_loop(), self._core
        core.log("draining", waiting=core.waiting)
        finished = await loop.run_in_executor(None, core.drain, self._listening.drain_s)
        flushed = loop.time() + _FLUSH_S
        while self._underway and loop.time() < flushed:
            await asyncio.sleep(0.01)
        core.log("drained", finished=finished)
        return finished

    def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Health and metrics over HTTP; a websocket for who may have one."""
        if request.path == "/healthz":
            if self._core.draining:
                return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "draining\n")
            return connection.respond(HTTPStatus.OK, "OK\n")
        shown = request.headers.get_all("Authorization")
        if not authorized(shown[0] if len(shown) == 1 else None, self._listening.token):
            self._core.metrics.count("connections_total", "event", "unauthorized")
            return connection.respond(
                HTTPStatus.UNAUTHORIZED, "this server needs its token: Authorization: Api-Key ...\n"
            )
        if request.path == "/metrics":
            return connection.respond(HTTPStatus.OK, self._core.metrics.render())
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
        guest = cast(_GuardedConnection, connection).guest
        guest.opened = True
        core.metrics.count("connections_total", "event", "opened")
        answers: asyncio.Queue[_Answer] = asyncio.Queue(self._listening.pipeline)
        writer = asyncio.create_task(self._write(connection, answers))
        try:
            await connection.send(self._metadata)
            async for message in connection:
                answer = _Answer(core.clock())
                self._underway += 1
                await answers.put(answer)
                self._accept(connection, message, answer)
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

    def _accept(self, client: ServerConnection, message: str | bytes, answer: _Answer) -> None:
        try:
            if isinstance(message, str):
                raise ServingError("malformed", "requests are binary messages, this one is text")
            decoded = decode_map(message, self._listening.bounds)
            answer.request_id = decoded.get("request_id")
            request = parse_request(decoded, self._core.specification)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            explained = self._core.explain(error)
            self._core.count(explained)
            answer.settle(explained)
            return
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
                else:
                    await connection.send(error_text(outcome, answer.request_id))
                previous_s = self._core.clock() - answer.arrived
            finally:
                self._underway -= 1


class _Answer:
    """The place of one answer in the order of a connection."""

    def __init__(self, arrived: float) -> None:
        self.arrived = arrived
        self.request_id: Any = None
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Outcome] = self._loop.create_future()

    def deliver(self, outcome: Outcome) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self.settle, outcome)

    def settle(self, outcome: Outcome) -> None:
        """From the loop's own thread."""
        if not self.future.done():
            self.future.set_result(outcome)


def metadata(core: Core) -> dict[str, Any]:
    """What a client learns first."""
    return {
        "artifact": core.artifact,
        "library": version("omega-qvla"),
        "specification": core.specification.dump(),
        "action_limits": core.limits.dump(),
        "deadline_ms": 1e3 * core.deadline_s,
        "batch": core.rules.batch,
    }


def _reply(reply: Reply, previous_s: float | None) -> dict[str, Any]:
    timing = {"infer_ms": 1e3 * reply.inference_s, "queue_ms": 1e3 * reply.queue_s}
    if previous_s is not None:
        timing["prev_total_ms"] = 1e3 * previous_s
    return {
        "actions": reply.actions,
        "server_timing": timing,
        "request_id": reply.request_id,
        "artifact": reply.artifact,
        "age_ms": 1e3 * reply.age_s,
        "batch": reply.batch,
    }


def error_text(error: ServingError, request_id: Any) -> str:
    """An error as a text message; the request's name only if it is one."""
    named = request_id if isinstance(request_id, int | str) and len(str(request_id)) <= 64 else None
    return json.dumps({"error": error.code, "message": str(error), "request_id": named})


class _Events(logging.Handler):
    """What the websocket library has to say, as events without tracebacks."""

    def __init__(self, core: Core) -> None:
        super().__init__(logging.WARNING)
        self._core = core

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        fields = {} if kind is None else {"error": kind.__name__}
        self._core.log("websocket", message=record.getMessage(), **fields)


def _quiet(core: Core) -> logging.Logger:
    logger = logging.Logger("omega_qvla.serving", logging.WARNING)
    logger.addHandler(_Events(core))
    return logger
