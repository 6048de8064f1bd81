"""Isaac-GR00T's ZMQ protocol in front of the same core.

A robot that uses N1.5's ``RobotInferenceClient`` (``gr00t/eval/robot.py``, ``eval/service.py``)
sends ``{"endpoint": "get_action", "data": observation}`` over a REQ socket and gets a map of named
action parts, or ``{"error": text}``; ``gr00t_messages.py`` has the details.  Three endpoints exist
here: ``ping``, ``get_action`` and ``get_modality_config``.  There is no ``kill``.

Two answers have room for what is ours: ``ping``, of which the client reads nothing, tells the
server's metadata, and an error, of which it reads ``error``, has code and request id beside it.

The protocol's token travels *inside* the message, so it cannot be checked before parsing; this
front therefore listens on loopback only.  A robot on another machine comes through an SSH tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.extras import needing
from omega_qvla.serving.server.access import is_loopback
from omega_qvla.serving.server.backlog import DEFAULT_LIMIT_BYTES, Backlog, Inbox, Message
from omega_qvla.serving.server.protocol_server import Pending, drain, error_fields, facts, metadata
from omega_qvla.serving.server.protocols.gr00t_messages import (
    action_parts,
    modality_configs,
    observation_of,
    parse_observation,
)
from omega_qvla.serving.server.scheduler import Core, Reply
from omega_qvla.serving.wire import DEFAULT_BOUNDS, Bounds, decode_map, encode, gr00t_array
from omega_qvla.serving.wire.specification import Request

with needing("GR00T's protocol", "serve"):
    import zmq
    import zmq.asyncio

_HANDSHAKE_MS = 5000
_MESSAGES_PER_CLIENT = 1
"""That ZMQ keeps before this front takes them; its clients send one and wait."""
_ENDPOINTS = ("ping", "get_action", "get_modality_config")


@dataclass(frozen=True)
class _Asked:
    """A request for actions, and whether the answer is to say more than them."""

    request: Request
    meta: bool


class Gr00tFront:
    """Serves a core to robots that speak Isaac-GR00T's protocol.

    Args:
        core: started.
        host, port: a loopback address; port 0 lets the system choose.
        bounds: of one message.
        waiting_bytes: of messages that are not answered, all clients together.
        drain_s: how long what is on its way may take at the end.

    Raises:
        PolicyError: the address can be reached from other machines.
    """

    def __init__(
        self,
        core: Core,
        host: str = "127.0.0.1",
        port: int = 5555,
        *,
        bounds: Bounds = DEFAULT_BOUNDS,
        waiting_bytes: int = DEFAULT_LIMIT_BYTES,
        drain_s: float = 3.0,
    ) -> None:
        if not is_loopback(host):
            raise PolicyError(
                f"GR00T's protocol carries its token inside the message, so it is served on "
                f"loopback only, not on {host}; reach it through: ssh -L {port}:127.0.0.1:{port} "
                "SERVER"
            )
        self._core, self._bounds, self._drain_s = core, bounds, drain_s
        self._address = f"tcp://{'127.0.0.1' if host == 'localhost' else host}:{port or '*'}"
        self._underway = 0
        self._backlog = Backlog(waiting_bytes)
        core.metrics.gauge("waiting_bytes", lambda: float(self._backlog.held))

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Serve until ``stop`` is set, then drain; see ``Front``.

        Raises:
            OSError: the address cannot be used.
        """
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.MAXMSGSIZE, self._bounds.message_bytes)
            socket.setsockopt(zmq.RCVHWM, _MESSAGES_PER_CLIENT)
            socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
            socket.setsockopt(zmq.LINGER, 500)
            socket.setsockopt(zmq.IPV6, 1)
            _bind(socket, self._address)
            endpoint = cast(bytes, socket.getsockopt(zmq.LAST_ENDPOINT)).decode()
            ready(int(endpoint.rpartition(":")[2]))
            talking = asyncio.create_task(self._talk(socket))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({talking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if talking.done():
                talking.result()  # only a failure ends it
            finished = await drain(self._core, self._drain_s, lambda: self._underway)
            talking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await talking
            return finished
        finally:
            socket.close()
            context.term()

    async def _talk(self, socket: zmq.asyncio.Socket) -> None:
        """Read requests; the answers leave from tasks of their own, one per client at most."""
        sending: set[asyncio.Task[None]] = set()
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or frames[1]:
                self._core.count(ServingError("malformed", "not from a REQ socket"))
                continue
            inbox = Inbox()  # of one message: whoever sends more of them waits for the answers
            message = self._backlog.put(inbox, frames[2])
            task = asyncio.create_task(self._answer(socket, frames[0], inbox, message))
            sending.add(task)
            task.add_done_callback(sending.discard)

    async def _answer(
        self, socket: zmq.asyncio.Socket, client: bytes, inbox: Inbox, message: Message
    ) -> None:
        self._underway += 1
        try:
            answer = await self._reply(client, message)
            self._backlog.leave(inbox)
            await socket.send_multipart([client, b"", encode(answer, gr00t_array)])
        finally:
            self._backlog.leave(inbox)
            self._underway -= 1

    async def _reply(self, client: bytes, message: Message) -> dict[str, Any]:
        read = self._read(message)
        if not isinstance(read, _Asked):
            return read
        pending = Pending()
        self._core.submit(client, read.request, pending.deliver)
        outcome = await pending.future
        if not isinstance(outcome, Reply):
            return _error(outcome, read.request.request_id)
        parts = action_parts(outcome.actions, self._core.specification)
        return {**parts, "meta": facts(outcome)} if read.meta else parts

    def _read(self, message: Message) -> _Asked | dict[str, Any]:
        """What a message asks the policy, or the answer where it asks nothing of it."""
        request_id: Any = None
        try:
            if message.refusal is not None:
                raise message.refusal
            call = decode_map(message.data, self._bounds)
            endpoint = call.get("endpoint", "get_action")
            if endpoint == "ping":
                return self._pong()
            if endpoint == "get_modality_config":
                return modality_configs(self._core.specification)
            if endpoint != "get_action":
                raise _unknown(endpoint)
            data = observation_of(call)
            request_id = data.get("request_id")
            request = parse_observation(data, self._core.specification)
            return _Asked(request, data.get("meta") is True)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            explained = self._core.explain(error)
            self._core.count(explained)
            return _error(explained, request_id)
        finally:
            message.data = b""  # a request has copies of its own; they count until it is answered

    def _pong(self) -> dict[str, Any]:
        state = "draining" if self._core.draining else "ok"
        return {
            "status": state,
            "message": "Server is running",
            "metadata": metadata(self._core),
        }


def _bind(socket: zmq.asyncio.Socket, address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise OSError(error.errno, f"{address}: {error}") from error


def _unknown(endpoint: Any) -> ServingError:
    shown = ascii(endpoint)[:60]
    return ServingError(
        "bad_request",
        f"unknown endpoint {shown}; this is the protocol of Isaac-GR00T N1.5, and here are "
        f"{', '.join(_ENDPOINTS)}",
    )


def _error(error: ServingError, request_id: Any) -> dict[str, Any]:
    """That client shows what is under ``error``."""
    told = error_fields(error, request_id)
    return {"error": told["message"], "code": told["error"], "request_id": told["request_id"]}
