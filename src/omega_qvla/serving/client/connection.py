"""One websocket connection of a client, in the thread that uses it and in no other.

The protocol is websockets' own without its input and output (``ClientProtocol``); here are the
socket and the time.  There are no locks and no threads, so that an exception of a signal's handler,
raised anywhere in here, leaves nothing behind that another call could wait for.  One thing may be
done from another thread: ``cut``.

A server's pings are answered while this side reads, and at the beginning of the next request.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Generator, Mapping

from omega_qvla.errors import PolicyError
from omega_qvla.extras import needing
from omega_qvla.serving.wire import DEFAULT_BOUNDS

with needing("a remote policy", "serve"):
    from websockets.client import ClientProtocol
    from websockets.exceptions import WebSocketException
    from websockets.frames import Frame, Opcode
    from websockets.protocol import State
    from websockets.uri import WebSocketURI, parse_uri

_READ_BYTES = 1 << 16
_EARLY_S = 1e-3
"""How much earlier than asked for the system may say that time is over."""


class GoneError(Exception):
    """The connection was refused, lost or ended; says why."""


class ExpiredError(Exception):
    """The time is over; says what was waited for."""


class Connection:
    """Not connected yet: ``open`` does that, so that whoever holds this can cut it at any moment.

    Args:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        headers: of the handshake.
        clock: monotonic seconds; every ``until`` is a time of it.

    Raises:
        PolicyError: this is no address.
    """

    def __init__(
        self, address: str, headers: Mapping[str, str], clock: Callable[[], float]
    ) -> None:
        try:
            self._uri: WebSocketURI = parse_uri(address)
        except WebSocketException as error:
            raise PolicyError(f"{error}; give ws://HOST:PORT or wss://HOST:PORT") from error
        self._headers, self._clock = headers, clock
        self._protocol = ClientProtocol(self._uri, max_size=DEFAULT_BOUNDS.message_bytes)
        self._socket: socket.socket | None = None
        self._cut = False
        self._frames: list[Frame] = []
        self._messages: deque[str | bytes] = deque()

    def open(self, until: float) -> None:
        """Connect and shake hands.

        Raises:
            GoneError: nobody there, or who is there refuses.
            ExpiredError: it took too long.
        """
        with self._explained(until, "a connection"):
            address = self._uri.host, self._uri.port
            self._socket = socket.create_connection(address, self._left(until))
            if self._cut:
                raise GoneError("it was given up")
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._uri.secure:
                context = ssl.create_default_context()
                self._socket = context.wrap_socket(self._socket, server_hostname=self._uri.host)
        request = self._protocol.connect()
        request.headers.update(self._headers)
        self._protocol.send_request(request)
        self._flush(until)
        while self._protocol.state is State.CONNECTING:
            if self._protocol.handshake_exc is not None:
                raise GoneError(self._reason())
            self._read(until)

    def send(self, message: bytes, until: float) -> None:
        """Send one message.

        Raises:
            GoneError: the connection was lost.
            ExpiredError: the other side reads too slowly.
        """
        self._require_open()
        self._protocol.send_binary(message)
        self._flush(until)

    def receive(self, until: float) -> str | bytes:
        """The next message.

        Raises:
            GoneError: the connection was lost.
            ExpiredError: it did not come in time.
        """
        while not self._messages:
            self._require_open()
            self._read(until)
        return self._messages.popleft()

    def is_quiet(self) -> bool:
        """Whether it is open and brought nothing that nobody asked for; does not wait."""
        if self._socket is None:
            return False
        try:
            while True:
                self._require_open()
                self._socket.settimeout(0.0)
                self._feed(self._socket.recv(_READ_BYTES))
                self._flush(self._clock() + 1.0)  # a pong
        except (BlockingIOError, ssl.SSLWantReadError):
            return not self._messages and not self._frames
        except (OSError, GoneError, ExpiredError):
            return False

    def cut(self) -> None:
        """End it at once, from any thread: whoever sends or waits on it is woken."""
        self._cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError, ValueError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def drop(self) -> None:
        """End it at once, from the thread that uses it."""
        self.cut()
        if self._socket is not None:
            self._socket.close()

    def close(self) -> None:
        """End it as the protocol wants it, without waiting for the other side."""
        with contextlib.suppress(OSError, GoneError, ExpiredError, WebSocketException):
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                self._flush(self._clock() + 1.0)
        self.drop()

    # --- bytes -------------------------------------------------------------------------------

    def _left(self, until: float) -> float:
        left_s = until - self._clock()
        if left_s <= 0:
            raise TimeoutError
        return max(left_s, 1e-6)

    @contextlib.contextmanager
    def _explained(self, until: float, awaited: str) -> Generator[None]:
        try:
            yield
        except TimeoutError as error:
            if self._clock() < until - _EARLY_S and error.errno is None:
                raise  # not of this wait: a signal's handler raised it
            raise ExpiredError(f"{awaited} took too long") from error
        except OSError as error:
            raise GoneError(str(error) or type(error).__name__) from error

    def _flush(self, until: float) -> None:
        assert self._socket is not None
        with self._explained(until, "sending"):
            for data in self._protocol.data_to_send():
                if data:
                    self._socket.settimeout(self._left(until))
                    self._socket.sendall(data)
                else:
                    self._socket.shutdown(socket.SHUT_WR)

    def _read(self, until: float) -> None:
        assert self._socket is not None
        with self._explained(until, "an answer"):
            self._socket.settimeout(self._left(until))
            data = self._socket.recv(_READ_BYTES)
        self._feed(data)
        self._flush(until)

    def _feed(self, data: bytes) -> None:
        """What came, to messages."""
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Frame):  # the other kind is the answer to the handshake
                self._collect(event)

    def _collect(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        self._frames.append(frame)
        if frame.fin:
            text = self._frames[0].opcode is Opcode.TEXT
            whole = b"".join(bytes(one.data) for one in self._frames)
            self._frames.clear()
            self._messages.append(whole.decode("utf-8", "replace") if text else whole)

    def _require_open(self) -> None:
        if self._protocol.state is not State.OPEN:
            raise GoneError(self._reason())

    def _reason(self) -> str:
        failed = self._protocol.handshake_exc or self._protocol.parser_exc
        if failed is not None:
            return str(failed)
        told = self._protocol.close_rcvd
        return "the connection was lost" if told is None else f"the server closed it: {told}"
