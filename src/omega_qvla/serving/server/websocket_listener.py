"""Connections that speak HTTP or a websocket, within the bounds of the library ``websockets``.

It limits a message (``max_size``), what is read ahead of one connection (``max_queue``), the time
for a handshake (``open_timeout``), and closes who does not answer its pings, such as a client that
stops in the middle of a message.  What it does not limit is the number of connections: here those
that have not finished their handshake are at most so many, and the oldest makes room for the next.
A network with worse in it needs a proxy in front (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, cast

from omega_qvla.extras import needing
from omega_qvla.serving.server.protocol_server import Listening
from omega_qvla.serving.server.scheduler import BatchScheduler

with needing("serving", "serve"):
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.http11 import Request as HttpRequest
    from websockets.http11 import Response

Talk = Callable[[ServerConnection], Awaitable[None]]
Admit = Callable[[ServerConnection, HttpRequest], Response | None]

_AT_ONCE = 64
"""Connections that asyncio takes in one turn of its loop, and that the kernel keeps: each costs the
loop a third of a millisecond, in which no reply leaves."""


@contextlib.asynccontextmanager
async def listen(
    scheduler: BatchScheduler, listening: Listening, talk: Talk, admit: Admit
) -> AsyncGenerator[int, None]:
    """A server for the length of a block; yields its port.

    Args:
        scheduler: its metrics are used, and its log takes what the websocket library says.
        listening: where and how.
        talk: serves one websocket.
        admit: answers a plain HTTP request, or lets it become a websocket with None.

    Raises:
        OSError: the address cannot be used.
    """
    silent: dict[_Connection, None] = {}

    def connect(*arguments: Any, **options: Any) -> ServerConnection:
        return _Connection(scheduler, silent, listening.silent, *arguments, **options)

    async def opened(connection: ServerConnection) -> None:
        silent.pop(cast(_Connection, connection), None)
        await talk(connection)

    try:
        server = await serve(
            opened,
            listening.host,
            listening.port,
            backlog=_AT_ONCE,
            ssl=listening.tls,
            origins=[None],
            compression=None,
            max_size=listening.bounds.message_bytes,
            max_queue=listening.pipeline,
            open_timeout=listening.handshake_s,
            ping_interval=listening.ping_s,
            ping_timeout=listening.ping_s,
            close_timeout=1.0,
            process_request=admit,
            server_header=None,
            logger=_quiet(scheduler),
            create_connection=cast(Any, connect),
        )
    except OSError as error:
        where = f"{listening.host or 'all interfaces'}, port {listening.port}"
        raise OSError(
            error.errno,
            f"cannot listen on {where}: {error.strerror}; is another server there? choose another "
            "host or port",
        ) from error
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 1.0)


class _Connection(ServerConnection):
    """A connection that is silent until its handshake is over."""

    def __init__(
        self,
        scheduler: BatchScheduler,
        silent: dict[_Connection, None],
        most: int,
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._scheduler, self._silent, self._most = scheduler, silent, most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._silent[self] = None
        if len(self._silent) > self._most:
            oldest = next(iter(self._silent))
            del self._silent[oldest]
            self._scheduler.metrics.count("connections_total", "silent")
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._silent.pop(self, None)
        super().connection_lost(exc)


class _Events(logging.Handler):
    """What the websocket library has to say, as events without tracebacks."""

    def __init__(self, scheduler: BatchScheduler) -> None:
        super().__init__(logging.WARNING)
        self._scheduler = scheduler

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        fields = {} if kind is None else {"error": kind.__name__}
        self._scheduler.log("websocket", message=record.getMessage(), **fields)


def _quiet(scheduler: BatchScheduler) -> logging.Logger:
    logger = logging.Logger("omega_qvla.serving", logging.WARNING)
    logger.addHandler(_Events(scheduler))
    return logger
