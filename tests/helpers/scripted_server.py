"""A websocket server that does to its clients what it is told: dies, stalls, doubles, lies.

Each request takes the next word of ``script``, each connection the next of ``handshakes``; where a
list is empty everything is well.  The actions are the first number of the request's state, so that
a client can tell whose they are.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from omega_qvla.serving.wire import decode_map, encode

HORIZON, WIDTH = 5, 3
SAFE = ("answer", "late error", "error")
"""Words after which a connection is as good as new."""
WORDS = (
    *SAFE,
    "twice",
    "previous first",
    "previous only",
    "foreign",
    "no name",
    "foreign error",
    "other artifact",
    "garbage",
    "text",
    "misshaped",
    "not finite",
    "flood",
    "swapped",
    "close",
    "die",
    "stall",
    "slow",
)
HANDSHAKES = ("well", "close", "die", "garbage", "text", "silent")


class ScriptedServer:
    """See the module; ``names`` says whether it answers as this project's server or as openpi's.

    Attributes:
        artifact: what it serves.
        script, handshakes: what it does next.
        opened, closed: connections so far.
        asked: ``(name, age_ms, value)`` of every request.
        slow_s: how long ``slow`` takes.
    """

    def __init__(self, port: int = 0, *, names: bool = True, slow_s: float = 0.02) -> None:
        self.artifact, self.names, self.slow_s = "one", names, slow_s
        self.script: deque[str] = deque()
        self.handshakes: deque[str] = deque()
        self.opened = self.closed = 0
        self.asked: list[tuple[Any, Any, float]] = []
        self._connections: set[ServerConnection] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._server = serve(self._talk, "127.0.0.1", port, compression=None, max_size=None)
        self.port = int(self._server.socket.getsockname()[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        return len(self._connections)

    def drop(self) -> None:
        """Every connection is lost."""
        for connection in list(self._connections):
            with suppress(OSError):
                connection.socket.shutdown(2)

    def stop(self) -> None:
        """No server any more."""
        self._ending.set()
        self.drop()
        # It waits for its connections: some clients left in the middle of a handshake.
        closing = threading.Thread(target=self._server.shutdown, daemon=True)
        closing.start()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.drop()
        closing.join(2)

    def metadata(self) -> dict[str, Any]:
        if not self.names:
            return {"reset_pose": [0.0, 1.0], "model": self.artifact}
        specification = {"horizon": HORIZON, "action_dim": WIDTH, "noise_shape": [HORIZON, WIDTH]}
        return {
            "artifact": self.artifact,
            "specification": specification,
            "deadline_ms": 60_000.0,
            "batch": 1,
        }

    def _talk(self, connection: ServerConnection) -> None:
        with self._lock:
            self.opened += 1
            self._connections.add(connection)
        try:
            if self._greet(connection):
                self._serve(connection)
        except (ConnectionClosed, OSError):
            pass
        finally:
            with self._lock:
                self.closed += 1
                self._connections.discard(connection)

    def _greet(self, connection: ServerConnection) -> bool:
        word = self.handshakes.popleft() if self.handshakes else "well"
        if word == "well":
            connection.send(encode(self.metadata()))
        elif word == "garbage":
            connection.send(b"\xc1")
        elif word == "text":
            connection.send("not yet")
        elif word == "silent":
            self._ending.wait(1.0)
        elif word == "die":
            connection.socket.shutdown(2)
        return word == "well"

    def _serve(self, connection: ServerConnection) -> None:
        held: list[bytes] = []
        previous: bytes | None = None
        for message in connection:
            assert isinstance(message, bytes)
            request = decode_map(message)
            name, value = request.get("request_id"), float(request["state"][0])
            self.asked.append((name, request.get("age_ms"), value))
            answer = self._reply(name, value)
            word = self.script.popleft() if self.script else "answer"
            for one in self._answers(word, connection, name, value, previous, held):
                connection.send(one)
            previous = answer

    def _reply(self, name: Any, value: float, **changes: Any) -> bytes:
        actions = np.full((HORIZON, WIDTH), value, np.float32)
        reply: dict[str, Any] = {"actions": actions, "server_timing": {"infer_ms": 1.0}}
        if self.names:
            reply |= {"request_id": name, "artifact": self.artifact, "age_ms": 0.0}
        reply |= changes
        return encode({key: one for key, one in reply.items() if one is not None})

    def _error(self, name: Any) -> str:
        return json.dumps({"error": "overloaded", "message": "full", "request_id": name})

    def _answers(
        self,
        word: str,
        connection: ServerConnection,
        name: Any,
        value: float,
        previous: bytes | None,
        held: list[bytes],
    ) -> Iterator[str | bytes]:
        """What is sent, in order; some words do not send but end."""
        right = self._reply(name, value)
        before = self._reply("earlier", -1.0) if previous is None else previous
        if word in ("slow", "late error"):
            time.sleep(self.slow_s)
        if word == "error" and not self.names:  # as openpi's: a traceback, and the end
            yield "Traceback (most recent call last): ..."
            connection.close(1011)
        elif word in ("error", "late error"):
            yield self._error(name)
        elif word in ("answer", "slow"):
            yield right
        elif word == "twice":
            yield from (right, right)
        elif word == "previous first":
            yield from (before, right)
        elif word == "previous only":
            yield before
        elif word == "swapped":  # held back until the next one was answered
            held.append(right)
            yield before
        elif word == "foreign":
            yield self._reply("somebody-else", -2.0)
        elif word == "no name":
            yield self._reply(None, -3.0)
        elif word == "foreign error":
            yield self._error("somebody-else")
        elif word == "other artifact":
            yield self._reply(name, -4.0, artifact="two")
        elif word == "garbage":
            yield b"\xc1\x00"
        elif word == "text":
            yield "what?"
        elif word == "misshaped":
            yield self._reply(name, value, actions=np.zeros((2, WIDTH), np.float32))
        elif word == "not finite":
            yield self._reply(name, value, actions=np.full((HORIZON, WIDTH), np.nan, np.float32))
        elif word == "flood":
            yield from [right] * 40
        elif word == "close":
            connection.close()
        elif word == "die":
            connection.socket.shutdown(2)
        if held and word != "swapped":
            yield from held
            held.clear()


@contextmanager
def scripted(**options: Any) -> Iterator[ScriptedServer]:
    """A scripted server for the length of a block."""
    server = ScriptedServer(**options)
    try:
        yield server
    finally:
        server.stop()


def state(value: float) -> dict[str, Any]:
    """An observation whose actions will be this number."""
    return {"state": np.full(4, value, np.float32), "prompt": "press"}
