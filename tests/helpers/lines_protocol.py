"""A serving protocol of one file: an observation as a line of JSON, its actions as another."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from omega_qvla.serving.server.protocol_server import Awaited, Listening, drain, error_fields, facts
from omega_qvla.serving.server.request_queue import Reply
from omega_qvla.serving.server.scheduler import BatchScheduler
from omega_qvla.serving.wire.specification import parse_request


class LinesServer:
    """Serves a scheduler to whoever sends lines."""

    def __init__(self, scheduler: BatchScheduler, listening: Listening) -> None:
        self._scheduler, self._listening = scheduler, listening
        self._underway = 0

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """See ``ProtocolServer``."""
        limit = self._listening.bounds.message_bytes
        where = self._listening.host, self._listening.port
        async with await asyncio.start_server(self._talk, *where, limit=limit) as server:
            ready(server.sockets[0].getsockname()[1])
            await stop.wait()
            return await drain(self._scheduler, self._listening.drain_s, lambda: self._underway)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            self._underway += 1
            writer.write(json.dumps(await self._answer(writer, line)).encode() + b"\n")
            await writer.drain()
            self._underway -= 1
        self._scheduler.withdraw(writer)
        writer.close()

    async def _answer(self, client: object, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
            images = message["images"].items()
            message["images"] = {name: np.array(image, np.uint8) for name, image in images}
            request = parse_request(message, self._scheduler.specification)
        except Exception as error:
            return error_fields(self._scheduler.refused(error), None)
        awaited = Awaited()
        self._scheduler.submit(client, request, awaited.deliver)
        outcome = await awaited.future
        if not isinstance(outcome, Reply):
            return error_fields(outcome, request.request_id)
        return {"actions": outcome.actions.tolist(), **facts(outcome)}
