"""The bounds of every connection that speaks HTTP or a websocket, before anything is understood.

A connection that has not sent the head of its request waits on the doorstep (``listener.py``), and
those that have come in at a bounded rate, one per chunk while chunks are computed
(``arrivals.py``).  One that has come in and not finished its handshake is *silent* as those outside
are: there are so many at most, and the oldest makes room for the next.
Bytes that do not complete a message are counted over all connections together, and a message that
takes too long ends its connection.  Complete messages are counted together too, until they are
answered (``backlog.py``).  What a connection may say once it is in is its front's business.

The websocket library queues what arrived for each connection on its own.  Here it queues *tokens*,
empty messages that say that one more can be taken from the inbox: so it still stops reading from a
client that is far ahead, and the bytes are where they can be counted, and given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from omega_qvla.extras import needing
from omega_qvla.serving.server.arrivals import Pace, Turnstile
from omega_qvla.serving.server.backlog import DEFAULT_LIMIT_BYTES, Backlog, Inbox
from omega_qvla.serving.server.listener import Doorstep, DoorstepSocket, bind
from omega_qvla.serving.server.scheduler import Core
from omega_qvla.serving.wire import DEFAULT_BOUNDS, Bounds

with needing("serving", "serve"):
    from websockets.asyncio.server import Server, ServerConnection, serve
    from websockets.exceptions import ConnectionClosed as ConnectionClosed  # for the fronts
    from websockets.frames import DATA_OPCODES, Frame, Opcode
    from websockets.http11 import Request as HttpRequest
    from websockets.http11 import Response

Talk = Callable[[ServerConnection], Awaitable[None]]
Admit = Callable[[ServerConnection, HttpRequest], Response | None]

_UNREAD_MESSAGES = 256
"""Of one connection at most.  The library stops reading far below; one piece of the network's can
hold tens of thousands of messages of a few bytes."""

_QUEUED = 1024
"""Connections that the kernel keeps until they may come in, where it lets a process say so."""

_SWEEP_S = 0.1
"""Between two looks for messages that take too long: those that began together end a few at a time,
and a robot's reply does not wait for all of them."""


@dataclass(frozen=True)
class Listening:
    """Where and how a server listens.

    Attributes:
        host, port: the address; port 0 lets the system choose.
        token: what clients must show, or None on loopback.
        tls: or None for plain TCP.
        bounds: of one message.
        connections: open at the same time at most.
        silent: connections that have not finished their handshake at most; so many on the
            doorstep, and so many that have come in.
        arrivals_per_s: connections that come in per second in the long run.
        arrivals: connections that come in at once at most.
        handshake_s, message_s: how long a handshake and one message may take to arrive.
        unfinished_bytes: of incomplete messages, all connections together.
        waiting_bytes: of complete messages that are not answered, all connections together.
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
    arrivals_per_s: float = 50.0
    arrivals: int = 16
    handshake_s: float = 5.0
    message_s: float = 10.0
    unfinished_bytes: int = 256 << 20
    waiting_bytes: int = DEFAULT_LIMIT_BYTES
    pipeline: int = 4
    drain_s: float = 3.0


@dataclass(eq=False)
class Guest:
    """One connection's part in the common bounds.

    Attributes:
        abort: ends it.
        unfinished: bytes held of a message that is not complete, finished fragments included.
        since: when that message began, or None.
        inbox: its complete messages.
    """

    abort: Callable[[], None]
    unfinished: int = 0
    since: float | None = None
    inbox: Inbox = field(default_factory=Inbox)


class Door:
    """The bounds that all connections share.

    Args:
        core: its clock and metrics are used, and its log takes what the websocket library says.
        listening: where and how.

    Attributes:
        guests: the connections, the oldest first.
        backlog: their complete messages.
        sockets: on which it listens.
    """

    def __init__(self, core: Core, listening: Listening) -> None:
        self.core, self.listening = core, listening
        self.guests: dict[Guest, None] = {}
        self.backlog = Backlog(listening.waiting_bytes)
        self.sockets: list[socket.socket] = []
        self._silent: dict[Guest, None] = {}
        self._unfinished = 0

    @property
    def opened(self) -> int:
        """Connections past their handshake; metrics may be read from any thread."""
        return len(self.guests) - len(self._silent)

    def enter(self, guest: Guest) -> None:
        """A connection came; if too many say nothing, the oldest of those goes."""
        self.guests[guest] = self._silent[guest] = None
        if len(self._silent) > self.listening.silent:
            self._close(next(iter(self._silent)), "silent")

    def turn_over(self) -> None:
        """A chunk has left: who waits outside may come in while the next one is asked for."""
        for one in self.sockets:
            if isinstance(one, DoorstepSocket):
                one.look_again()

    def opens(self, guest: Guest) -> None:
        """A connection's handshake is over."""
        self._silent.pop(guest, None)

    def leave(self, guest: Guest) -> None:
        """A connection is gone."""
        self.guests.pop(guest, None)
        self._silent.pop(guest, None)
        self._unfinished -= guest.unfinished
        guest.unfinished = 0
        self.backlog.leave(guest.inbox)

    def holds(self, guest: Guest, count: int) -> None:
        """So many bytes of a connection's present message have come, and more are to come."""
        if guest not in self.guests:  # closed, with more to read in the same piece
            return
        self._unfinished += count - guest.unfinished
        guest.unfinished = count
        if not count:
            guest.since = None
            return
        if guest.since is None:
            guest.since = self.core.clock()
        if self._unfinished > self.listening.unfinished_bytes:
            self._close(guest, "unfinished_bytes")

    def completes(self, guest: Guest, data: bytes) -> None:
        """A whole message has come."""
        if guest not in self.guests:  # closed, with more to read in the same piece
            return
        self.backlog.put(guest.inbox, data)
        if len(guest.inbox.unread) > _UNREAD_MESSAGES:
            self._close(guest, "unread_messages")

    def sweep(self) -> None:
        """Close the connections whose message takes too long."""
        limit = self.core.clock() - self.listening.message_s
        for guest in list(self.guests):
            silent = guest in self._silent
            if not silent and guest.since is not None and guest.since < limit:
                self._close(guest, "slow_message")

    def _close(self, guest: Guest, reason: str) -> None:
        self.leave(guest)
        self.core.metrics.count("connections_total", "event", reason)
        guest.abort()


class GuardedConnection(ServerConnection):
    """A connection that reports what arrives to the door."""

    def __init__(self, door: Door, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.door = door
        self._fragments = bytearray()
        self._opcode = Opcode.BINARY
        self.guest = Guest(self._abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.door.enter(self.guest)

    def connection_lost(self, exc: Exception | None) -> None:
        self.door.leave(self.guest)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # What the parser could not use yet is part of a message, wherever the segments were cut.
        self.door.holds(self.guest, len(self._fragments) + len(self.protocol.reader.buffer))

    def process_event(self, event: Any) -> None:
        if not isinstance(event, Frame):
            self.guest.since = None  # the handshake's request is complete
            super().process_event(event)
        elif event.opcode not in DATA_OPCODES:
            super().process_event(event)
        elif self._gather(event):
            super().process_event(Frame(self._opcode, b""))

    def _gather(self, frame: Frame) -> bool:
        """One more frame of a message; whether that was the last one."""
        if frame.opcode is not Opcode.CONT:
            self._opcode = frame.opcode
        if not frame.fin:
            self._fragments += frame.data
            return False
        whole = bytes(self._fragments + frame.data if self._fragments else frame.data)
        self._fragments = bytearray()
        self.guest.since = None
        self.door.completes(self.guest, whole)
        return True

    def _abort(self) -> None:
        self.transport.abort()


@contextlib.asynccontextmanager
async def guarded(door: Door, talk: Talk, admit: Admit) -> AsyncGenerator[int, None]:
    """A server for the length of a block; yields its port.

    Args:
        door: where it listens, and the bounds its connections share.
        talk: serves one websocket.
        admit: answers a plain HTTP request, or lets it become a websocket with None.

    Raises:
        OSError: the address cannot be used.
    """

    def connect(*arguments: Any, **options: Any) -> ServerConnection:
        return GuardedConnection(door, *arguments, **options)

    listening = door.listening
    clock = door.core.clock
    pace = Pace(listening.arrivals_per_s, listening.arrivals, clock)
    doorstep = Doorstep(
        Turnstile(pace, door.core.turn, clock),
        listening.silent,
        listening.handshake_s,
        listening.tls is not None,
        lambda: door.core.metrics.count("connections_total", "event", "silent"),
    )
    async with contextlib.AsyncExitStack() as stack:
        sockets = door.sockets = await bind(listening.host, listening.port, doorstep)
        for one in sockets:
            stack.callback(one.close)
        for one in sockets:
            server = await serve(
                talk,
                sock=one,
                backlog=_QUEUED,
                ssl=listening.tls,
                origins=[None],
                compression=None,
                max_size=listening.bounds.message_bytes,
                max_queue=listening.pipeline,
                open_timeout=listening.handshake_s,
                close_timeout=1.0,
                process_request=admit,
                server_header=None,
                logger=_quiet(door.core),
                create_connection=cast(Any, connect),
            )
            stack.push_async_callback(_close, server)
        sweeper = asyncio.create_task(_sweep(door))
        stack.callback(sweeper.cancel)
        yield sockets[0].getsockname()[1]


async def _close(server: Server) -> None:
    server.close()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(server.wait_closed(), 1.0)


async def _sweep(door: Door) -> None:
    while True:
        await asyncio.sleep(_SWEEP_S)
        door.sweep()


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
