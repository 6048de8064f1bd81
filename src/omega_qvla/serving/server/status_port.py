"""Health and metrics on a port of their own, for a protocol that has no room for them.

ZMQ sockets speak no HTTP, so a probe or a Prometheus server could not reach GR00T's server.  Beside
it listens what openpi's listens with (``websocket_listener.py``: the same bounds, token and TLS)
and answers what that one answers (``protocol_server.status``); anything else is not found, and
nothing becomes a websocket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from omega_qvla.serving.server.protocol_server import Listening, ProtocolServer, status
from omega_qvla.serving.server.scheduler import BatchScheduler
from omega_qvla.serving.server.websocket_listener import (
    HttpRequest,
    Response,
    ServerConnection,
    listen,
)


class WithStatusPort:
    """A server, and health and metrics beside it until it has drained.

    Args:
        scheduler: of the server.
        server: what serves robots.
        listening: where health and metrics are answered.
    """

    def __init__(
        self, scheduler: BatchScheduler, server: ProtocolServer, listening: Listening
    ) -> None:
        self._scheduler, self._server, self._listening = scheduler, server, listening

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Both, until ``stop`` is set; see ``ProtocolServer``.  The log tells the port: ``status``.

        Raises:
            OSError: one of the addresses cannot be used.
        """
        scheduler, listening = self._scheduler, self._listening
        async with listen(scheduler, listening, _nothing, self._answer) as port:
            scheduler.log("status", host=listening.host, port=port)
            return await self._server.serve(stop, ready)

    def _answer(self, connection: ServerConnection, request: HttpRequest) -> Response:
        shown = request.headers.get_all("Authorization")
        answer = status(self._scheduler, self._listening.token, request.path, shown)
        return connection.respond(
            *(answer or (HTTPStatus.NOT_FOUND, "here are /healthz and /metrics\n"))
        )


async def _nothing(connection: ServerConnection) -> None:
    """Never called: every request was answered before it could become a websocket."""
