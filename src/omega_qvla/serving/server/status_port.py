"""Health and metrics on a port of their own, for a front whose protocol has no room for them.

ZMQ sockets speak no HTTP, so a probe or a Prometheus server could not reach GR00T's front.  Beside
it listens what the websocket front listens with (``door.py``: the same bounds, token and TLS) and
answers what that one answers (``front.status``); anything else is not found, and nothing becomes a
websocket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from omega_qvla.serving.server.door import (
    Door,
    HttpRequest,
    Listening,
    Response,
    ServerConnection,
    guarded,
)
from omega_qvla.serving.server.protocol_server import Front, status
from omega_qvla.serving.server.scheduler import Core


class WithStatusPort:
    """A front, and health and metrics beside it until it has drained.

    Args:
        core: of the front.
        front: what serves robots.
        listening: where health and metrics are answered.
    """

    def __init__(self, core: Core, front: Front, listening: Listening) -> None:
        self._core, self._front, self._listening = core, front, listening

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Both, until ``stop`` is set; see ``Front``.  The port is told in the log, as ``status``.

        Raises:
            OSError: one of the addresses cannot be used.
        """
        core, listening = self._core, self._listening
        async with guarded(Door(core, listening), _nothing, self._answer) as port:
            core.log("status", host=listening.host, port=port)
            return await self._front.serve(stop, ready)

    def _answer(self, connection: ServerConnection, request: HttpRequest) -> Response:
        shown = request.headers.get_all("Authorization")
        answer = status(self._core, self._listening.token, request.path, shown)
        return connection.respond(
            *(answer or (HTTPStatus.NOT_FOUND, "here are /healthz and /metrics\n"))
        )


async def _nothing(connection: ServerConnection) -> None:
    """Never called: every request was answered before it could become a websocket."""
