"""Isaac-GR00T's ZMQ protocol in front of the scheduler.

A robot that uses N1.5's ``RobotInferenceClient`` (``gr00t/eval/robot.py``, ``eval/service.py``)
sends ``{"endpoint": "get_action", "data": observation}`` over a REQ socket and gets a map of named
action parts, or ``{"error": text}``.  Three endpoints exist here: ``ping``, ``get_action`` and
``get_modality_config``.  There is no ``kill``.

| key of the observation | value |
|---|---|
| ``video.CAMERA`` | uint8 [1, H, W, 3] or [H, W, 3] |
| ``state.PART`` | numbers [1, width] or [width] |
| ``annotation.…`` | the instruction, or a list with it |
| ``request_id``, ``deadline_ms``, ``age_ms``, ``noise`` | as over the websocket |
| ``previous``, ``delay`` | the same; the parts of actions one after the other |
| ``meta`` | true: the answer has a map ``meta`` |

The last three lines are ours.  They are in the observation because that is what the published
client lets a robot fill: it builds the rest of the request itself.

The answer holds ``action.PART`` [horizon, width] float32, and beside them nothing, because robots
take every key for an action (``eval/wrappers/multistep_wrapper.py`` slices each value).  Request
id, artifact, age and timing are therefore under ``meta``, and only where the request asks for it.

A robot may also ask what the policy takes (``get_modality_config``).  N1.5 answers a map of its
``ModalityConfig`` (``data/dataset.py``: time steps relative to now, and keys), each as
``{"__ModalityConfig_class__": true, "as_json": text}`` (``eval/service.py``), which is plain data.

Two answers have room for what is ours: ``ping``, of which the client reads nothing, tells the
server's metadata, and an error, of which it reads ``error``, has code and request id beside it.

The protocol's token travels *inside* the message, so it cannot be checked before parsing; this
server therefore listens on loopback only.  A robot on another machine comes through an SSH tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.extras import needing
from omega_qvla.serving.server.access import is_loopback
from omega_qvla.serving.server.protocol_server import (
    Awaited,
    Listening,
    drain,
    error_fields,
    facts,
    metadata,
)
from omega_qvla.serving.server.request_queue import Reply
from omega_qvla.serving.server.scheduler import BatchScheduler
from omega_qvla.serving.wire import decode_map, encode, gr00t_array
from omega_qvla.serving.wire.specification import CONTROL, Request, Specification, parse_request

with needing("GR00T's protocol", "serve"):
    import zmq
    import zmq.asyncio

Array = npt.NDArray[Any]

INSTRUCTION = "annotation.human.action.task_description"
"""What most of N1.5's data configurations call the instruction; any other annotation is taken."""
_MESSAGES_PER_CLIENT = 1
"""That ZMQ keeps before this server takes them; its clients send one and wait."""
_ENDPOINTS = ("ping", "get_action", "get_modality_config")


class Gr00tServer:
    """Serves a scheduler to robots that speak Isaac-GR00T's protocol.

    Args:
        scheduler: started.
        listening: a loopback address; this protocol has neither a token nor TLS.

    Raises:
        PolicyError: the address can be reached from other machines.
    """

    def __init__(self, scheduler: BatchScheduler, listening: Listening) -> None:
        host, port = listening.host, listening.port
        if not is_loopback(host):
            raise PolicyError(
                f"GR00T's protocol carries its token inside the message, so it is served on "
                f"loopback only, not on {host}; reach it through: ssh -L {port}:127.0.0.1:{port} "
                "SERVER"
            )
        self._scheduler, self._listening = scheduler, listening
        self._address = f"tcp://{'127.0.0.1' if host == 'localhost' else host}:{port or '*'}"
        self._underway = 0

    async def serve(self, stop: asyncio.Event, ready: Callable[[int], None]) -> bool:
        """Serve until ``stop`` is set, then drain; see ``ProtocolServer``.

        Raises:
            OSError: the address cannot be used.
        """
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.ROUTER)
        try:
            socket.setsockopt(zmq.MAXMSGSIZE, self._listening.bounds.message_bytes)
            socket.setsockopt(zmq.RCVHWM, _MESSAGES_PER_CLIENT)
            socket.setsockopt(zmq.HANDSHAKE_IVL, int(1e3 * self._listening.handshake_s))
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
            drain_s = self._listening.drain_s
            finished = await drain(self._scheduler, drain_s, lambda: self._underway)
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
                self._scheduler.refused(ServingError("malformed", "not from a REQ socket"))
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

    async def _reply(self, client: Hashable, message: bytes) -> dict[str, Any]:
        request_id: Any = None
        try:
            call = decode_map(message, self._listening.bounds)
            endpoint = call.get("endpoint", "get_action")
            if endpoint == "ping":
                return self._pong()
            if endpoint == "get_modality_config":
                return modality_configs(self._scheduler.specification)
            if endpoint != "get_action":
                raise _unknown(endpoint)
            data = _observation_of(call)
            request_id = data.get("request_id")
            request = parse_observation(data, self._scheduler.specification)
        except Exception as error:  # a failed allocation, say: this request's affair, no other's
            return _error(self._scheduler.refused(error), request_id)
        awaited = Awaited()
        self._scheduler.submit(client, request, awaited.deliver)
        outcome = await awaited.future
        if not isinstance(outcome, Reply):
            return _error(outcome, request_id)
        parts = action_parts(outcome.actions, self._scheduler.specification)
        return {**parts, "meta": facts(outcome)} if data.get("meta") is True else parts

    def _pong(self) -> dict[str, Any]:
        state = "draining" if self._scheduler.draining else "ok"
        return {
            "status": state,
            "message": "Server is running",
            "metadata": metadata(self._scheduler),
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


# --- messages --------------------------------------------------------------------------------


def _observation_of(call: Mapping[str, Any]) -> dict[Any, Any]:
    """What a call of ``get_action`` brings.

    Raises:
        ServingError: ``bad_request``; it brings no map.
    """
    data = call.get("data")
    if not isinstance(data, dict):
        raise _bad("'data' must be an observation, a map")
    return cast(dict[Any, Any], data)


def parse_observation(data: Mapping[Any, Any], specification: Specification) -> Request:
    """A request out of GR00T's observation.

    Raises:
        ServingError: ``bad_request``; says which key is wrong.
    """
    images: dict[str, Any] = {}
    state: dict[str, Any] = {}
    prompts: list[Any] = []
    control: dict[str, Any] = {}
    for key, value in data.items():
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
    parts = _state_parts(specification)
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
    parts = _action_parts(specification)
    ends = np.cumsum([width for _, width in parts])[:-1]
    pieces = np.split(actions, ends, axis=1)
    return {f"action.{name}": piece for (name, _), piece in zip(parts, pieces, strict=True)}


def modality_configs(specification: Specification) -> dict[str, Any]:
    """What the policy takes and gives, as N1.5 describes it.

    Observations are of the present (index 0); action i of a chunk is for i steps from now.
    """
    states = [f"state.{name}" for name, _ in _state_parts(specification)]
    actions = [f"action.{name}" for name, _ in _action_parts(specification)]
    return {
        "video": _modality([f"video.{camera}" for camera in specification.cameras], [0]),
        "state": _modality(states, [0]),
        "action": _modality(actions, range(specification.horizon)),
        "language": _modality([INSTRUCTION], [0]),
    }


def _modality(keys: Sequence[str], indices: Sequence[int]) -> dict[str, Any]:
    fields = {"delta_indices": list(indices), "modality_keys": list(keys)}
    return {"__ModalityConfig_class__": True, "as_json": json.dumps(fields)}


def _state_parts(specification: Specification) -> Sequence[tuple[str, int]]:
    return specification.state_parts or (("state", specification.state_dim),)


def _action_parts(specification: Specification) -> Sequence[tuple[str, int]]:
    return specification.action_parts or (("action", specification.action_dim),)


def _bad(message: str) -> ServingError:
    return ServingError("bad_request", message)
