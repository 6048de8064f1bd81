"""Isaac-GR00T's ZMQ protocol in front of the same core.

A robot that uses N1.5's ``RobotInferenceClient`` (``gr00t/eval/service.py``) sends
``{"endpoint": "get_action", "data": observation}`` over a REQ socket and gets a map of named action
parts, or ``{"error": text}``.  Two endpoints exist here: ``ping`` and ``get_action``.  There is no
``kill``.

| key of the observation | value |
|---|---|
| ``video.CAMERA`` | uint8 [1, H, W, 3] or [H, W, 3] |
| ``state.PART`` | numbers [1, width] or [width] |
| ``annotation.…`` | the instruction, or a list with it |
| ``request_id``, ``deadline_ms``, ``age_ms``, ``noise`` | as over the websocket |
| ``meta`` | true: the answer has a map ``meta`` |

The last two lines are ours.  They are in the observation because that is what the published client
lets a robot fill: it builds the rest of the request itself.

The answer holds ``action.PART`` [horizon, width] float32, and beside them nothing, because robots
take every key for an action (``eval/wrappers/multistep_wrapper.py`` slices each value).  Request
id, artifact, age and timing are therefore under ``meta``, and only where the request asks for it.
Two answers have room for more: ``ping``, of which the client reads nothing, tells the server's
metadata, and an error, of which it reads ``error``, has code and request id beside it.

The protocol's token travels *inside* the message, so it cannot be checked before parsing; this
front therefore listens on loopback only.  A robot on another machine comes through an SSH tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import PolicyError, ResourceError, ServingError
from omega_qvla.serving.access import is_loopback
from omega_qvla.serving.core import Core, Reply
from omega_qvla.serving.front import Pending, drain, error_fields, facts, metadata
from omega_qvla.serving.specification import CONTROL, Request, Specification, parse_request
from omega_qvla.serving.wire import DEFAULT_BOUNDS, Bounds, decode_map, encode, gr00t_array

try:
    import zmq
    import zmq.asyncio
except ImportError as error:
    raise ResourceError(
        "GR00T's protocol needs the package pyzmq: pip install 'omega-qvla[serve]'"
    ) from error

Array = npt.NDArray[Any]

_HANDSHAKE_MS = 5000
_MESSAGES_PER_CLIENT = 4


class Gr00tFront:
    """Serves a core to robots that speak Isaac-GR00T's protocol.

    Args:
        core: started.
        host, port: a loopback address; port 0 lets the system choose.
        bounds: of one message.
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
            task = asyncio.create_task(self._answer(socket, frames[0], frames[2]))
            sending.add(task)
            task.add_done_callback(sending.discard)

    async def _answer(self, socket: zmq.asyncio.Socket, client: bytes, message: bytes) -> None:
        self._underway += 1
        try:
            answer = await self._reply(client, message)
            await socket.send_multipart([client, b"", encode(answer, gr00t_array)])
        finally:
            self._underway -= 1

    async def _reply(self, client: bytes, message: bytes) -> dict[str, Any]:
        specification = self._core.specification
        data: dict[str, Any] = {}
        try:
            call = decode_map(message, self._bounds)
            endpoint = call.get("endpoint", "get_action")
            if endpoint == "ping":
                return self._pong()
            if endpoint != "get_action":
                raise ServingError("bad_request", "the endpoints are ping and get_action")
            data = _observation(call.get("data"))
            request = parse_observation(data, specification)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            explained = self._core.explain(error)
            self._core.count(explained)
            return _error(explained, data)
        pending = Pending()
        self._core.submit(client, request, pending.deliver)
        outcome = await pending.future
        if not isinstance(outcome, Reply):
            return _error(outcome, data)
        parts = action_parts(outcome.actions, specification)
        return {**parts, "meta": facts(outcome)} if data.get("meta") is True else parts

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


def parse_observation(data: Any, specification: Specification) -> Request:
    """A request out of GR00T's observation.

    Raises:
        ServingError: ``bad_request``; says which key is wrong.
    """
    images: dict[str, Any] = {}
    state: dict[str, Any] = {}
    prompts: list[Any] = []
    control: dict[str, Any] = {}
    for key, value in _observation(data).items():
        kind, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
        if kind == "video":
            images[name] = _one_frame(key, value)
        elif kind == "state":
            state[name] = value
        elif kind == "annotation":
            prompts.append(value)
        elif key in CONTROL:
            control[key] = value
        elif key != "meta" or not isinstance(value, bool):
            raise _bad(
                f"unknown key {ascii(key)[:60]}; known are video.*, state.*, annotation.*, "
                f"{', '.join(CONTROL)} and meta (true or false)"
            )
    if len(prompts) != 1:
        raise _bad(f"one annotation.* must hold the instruction, found {len(prompts)}")
    return parse_request(
        {
            "images": images,
            "state": _joined(state, specification),
            "prompt": _one_text(prompts[0]),
            **control,
        },
        specification,
    )


def _observation(data: Any) -> dict[Any, Any]:
    if not isinstance(data, dict):
        raise _bad("'data' must be an observation, a map")
    return cast(dict[Any, Any], data)


def _one_frame(key: str, value: Any) -> Any:
    """The single time step of a video."""
    if isinstance(value, np.ndarray) and value.ndim == 4:
        frames = cast(Array, value)
        if len(frames) != 1:
            raise _bad(f"{ascii(key)[:60]} has {len(frames)} time steps; this policy takes one")
        return frames[0]
    return value


def _one_text(value: Any) -> Any:
    if isinstance(value, list) and len(cast(list[Any], value)) == 1:
        return cast(list[Any], value)[0]
    return value


def _joined(state: Mapping[str, Any], specification: Specification) -> Array:
    """The state's parts, in the policy's order."""
    parts = specification.state_parts or (("state", specification.state_dim),)
    expected = [name for name, _ in parts]
    if set(state) != set(expected):
        shown = [ascii(name)[:40] for name in list(state)[:16]]
        raise _bad(f"the state has the parts {shown}, the policy needs {expected}")
    pieces: list[Array] = []
    for name, width in parts:
        value = state[name]
        if not isinstance(value, np.ndarray):
            raise _bad(f"state.{name} must be an array, found {type(value).__name__}")
        piece = cast(Array, value)
        if piece.shape not in ((width,), (1, width)):
            raise _bad(f"state.{name} must have shape [1, {width}], found {list(piece.shape)}")
        pieces.append(piece.reshape(width))
    with np.errstate(over="ignore"):
        return np.concatenate(pieces).astype(np.float32)


def action_parts(actions: Array, specification: Specification) -> dict[str, Any]:
    """A chunk [H, A] as GR00T's named parts."""
    parts = specification.action_parts or (("action", specification.action_dim),)
    ends = np.cumsum([width for _, width in parts])[:-1]
    pieces = np.split(actions, ends, axis=1)
    return {f"action.{name}": piece for (name, _), piece in zip(parts, pieces, strict=True)}


def _error(error: ServingError, data: Mapping[str, Any]) -> dict[str, Any]:
    """That client shows what is under ``error``."""
    told = error_fields(error, data.get("request_id"))
    return {"error": told["message"], "code": told["error"], "request_id": told["request_id"]}


def _bad(message: str) -> ServingError:
    return ServingError("bad_request", message)
