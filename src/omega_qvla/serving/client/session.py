"""A robot's line to a server: which connection a request uses, and what it accepts as its answer.

Four rules keep one observation's actions from being taken for another's:

* a connection is either idle, with nothing outstanding on it, or it belongs to one call.  A call
  gives it back after the answer to its own request; however else it ends (an exception of any kind,
  a signal, another thread that gives it up), the connection is cut, and an answer that is still on
  its way with it;
* every request has a name of its own, and an answer with another name, or another artifact's, is an
  error.  openpi's own server does not send names back.  Of such a server an idle connection on
  which something has arrived is cut as well, and so is one that brought an error;
* a request has the age of its *observation*: it is counted again when it is sent a second time,
  over a new connection, and when its answer is there.  Past its deadline it is neither sent nor
  returned, and nobody goes on connecting or waiting for it;
* a session belongs to one policy.  A server that comes back with another one is an error.

Another thread may end a session (``end``), which never waits: a call in it fails, and as the call
holds nothing but this session, whatever becomes of it reaches no other.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ServingError, WireError
from omega_qvla.real_time_chunking import LeftOver
from omega_qvla.serving.client.connection import Connection, ExpiredError, GoneError
from omega_qvla.serving.wire import decode_map, encode

_NOW = "now"
_MAY_CHANGE = ("batch", "deadline_ms", "library")
"""What a server may tell differently after a restart with the same policy."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a client tries.

    Attributes:
        reply_s: how long an answer may take.
        attempts: to connect, one after the other.
        first_pause_s, longest_pause_s: between attempts; each is twice the one before.
    """

    reply_s: float = 30.0
    attempts: int = 8
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, attempt: int) -> float:
        """The pause after a failed attempt, counted from 0."""
        return min(self.first_pause_s * 2.0**attempt, self.longest_pause_s)


DEFAULT_RETRY_POLICY = RetryPolicy()


@dataclass(frozen=True)
class Server:
    """Where a session connects to, and by which clock.

    Attributes:
        address: ``ws://HOST:PORT`` or ``wss://HOST:PORT``.
        headers: of the handshake.
        retry_policy: how long to try.
        clock: monotonic seconds.
        sleep: waits for so many seconds.
    """

    address: str
    headers: Mapping[str, str]
    retry_policy: RetryPolicy
    clock: Callable[[], float]
    sleep: Callable[[float], None]


@dataclass(frozen=True)
class Question:
    """A request for the actions of one observation.

    Attributes:
        content: what is sent, without what follows.
        request_id: its name, which no other request has.
        observed: when the observation was made.
        deadline_s: how old it may be when its actions are there, or None.
        noise: what sampling starts from, or None.
        left_over: what the new chunk continues, or None.
    """

    content: Mapping[str, Any]
    request_id: str
    observed: float
    deadline_s: float | None = None
    noise: npt.NDArray[np.float32] | None = None
    left_over: LeftOver | None = None


@dataclass(eq=False)
class _Call:
    """A request on its way: who asks, and the connection that is his until it has an answer."""

    thread: int
    connection: Connection | None = None


class Session:
    """One policy at the other end of one connection at a time.

    Args:
        server: where.
        metadata: what the server is known to tell, or None where it was never asked.
        connections: made before.

    Attributes:
        metadata: what the server told when it was first asked.
        connections: how many were made.
    """

    def __init__(
        self, server: Server, metadata: Mapping[str, Any] | None = None, connections: int = 0
    ) -> None:
        self._server = server
        self.metadata = None if metadata is None else dict(metadata)
        self.connections = connections
        self._calls: dict[str, _Call] = {}
        self._idle: Connection | None = None
        self._ended: ServingError | None = None

    def successor(self) -> Session:
        """A session for the same policy, with a connection of its own."""
        return Session(self._server, self.metadata, self.connections)

    def open(self) -> None:
        """Connect, if there is no connection.

        Raises:
            ServingError: ``unreachable``.
        """
        with self._turn() as call:
            self._take(call, math.inf)
            self._give_back(call)

    def end(self, error: ServingError) -> None:
        """Never ask again; a call in another thread fails with this error.  Does not wait for it.

        What is idle is closed as the protocol wants it.
        """
        self._ended = error
        call, idle = self._calls.get(_NOW), self._idle
        if call is not None and call.connection is not None:
            call.connection.cut()
        elif idle is not None:
            idle.close()

    def ask(self, asked: Question) -> dict[str, Any]:
        """The reply to a request; its ``age_ms`` is counted from the observation to now.

        Raises:
            ServingError: see ``RemotePolicy.infer``.
        """
        with self._turn() as call:
            try:
                answer = self._answer(call, asked)
            except GoneError:  # a server that was restarted: once more, with the age it has
                self._drop(call)
                answer = self._answer(call, asked, again=True)
            outcome = self._understood(answer, asked)
            if self._names_requests or not isinstance(outcome, ServingError):
                self._give_back(call)
        if isinstance(outcome, ServingError):
            raise outcome
        self._require_in_time(asked, "its actions came")
        return {**outcome, "age_ms": 1e3 * self._age(asked)}

    # --- whose turn it is --------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self) -> Generator[_Call]:
        """One call at a time; what it leaves outstanding is cut."""
        self._raise_if_ended()
        call = _Call(threading.get_ident())
        other = self._calls.setdefault(_NOW, call)
        try:
            if other is not call:
                self._replace(other, call)
            yield call
        finally:
            self._drop(call)
            if self._calls.get(_NOW) is call:
                self._calls.pop(_NOW, None)
            if self._ended is not None and self._idle is not None:  # given back after the end
                self._idle.close()

    def _replace(self, other: _Call, call: _Call) -> None:
        """This thread's own earlier call was interrupted; another thread's is still asking."""
        if other.thread != call.thread:
            raise ServingError(
                "busy",
                "another thread waits for an answer of this remote policy; give each thread one of "
                "its own",
            )
        self._calls[_NOW] = call
        if other.connection is not None:
            other.connection.cut()  # its owner may be waiting: this is a signal's handler

    def _take(self, call: _Call, expires: float) -> Connection:
        """A connection with nothing outstanding, the call's until it is given back."""
        call.connection = self._idle
        self._idle = None
        if call.connection is not None and not call.connection.is_quiet():
            self._drop(call)
        if call.connection is None:
            self._connect(call, expires)
        assert call.connection is not None
        return call.connection

    def _give_back(self, call: _Call) -> None:
        self._idle = call.connection
        call.connection = None

    def _drop(self, call: _Call) -> None:
        if call.connection is not None:
            call.connection.drop()
            call.connection = None

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            raise ServingError(self._ended.code, str(self._ended))

    # --- connecting --------------------------------------------------------------------------

    def _connect(self, call: _Call, expires: float) -> None:
        """Make a connection the call's; nobody goes on past the observation's deadline."""
        retry_policy, clock = self._server.retry_policy, self._server.clock
        reason: Exception | None = None
        tried = 0
        while tried < retry_policy.attempts:
            if tried:
                pause_s = retry_policy.pause_s(tried - 1)
                if clock() + pause_s >= expires:
                    break
                self._server.sleep(pause_s)
            self._raise_if_ended()
            until = min(clock() + retry_policy.reply_s, expires)
            if clock() >= until:
                break
            tried += 1
            try:
                metadata = self._shake_hands(call, until)
            except (GoneError, ExpiredError, WireError) as error:
                self._raise_if_ended()
                reason = error
                self._drop(call)
                continue
            self._raise_if_ended()
            self._require_same(metadata)
            self.connections += 1
            return
        in_time = "" if tried == retry_policy.attempts else " before the observation's deadline"
        raise ServingError(
            "unreachable",
            f"{self._server.address} could not be reached in {tried} attempts{in_time}: {reason}",
        ) from reason

    def _shake_hands(self, call: _Call, until: float) -> dict[str, Any]:
        """Connect and read what the server tells first."""
        # The connection is the call's before there is one: however this ends, it is ended.
        connection = Connection(self._server.address, self._server.headers, self._server.clock)
        call.connection = connection
        self._raise_if_ended()
        connection.open(until)
        told = connection.receive(until)
        if isinstance(told, str):
            raise WireError(f"the server's first message is a text: {told[:200]}")
        return decode_map(told)

    def _require_same(self, metadata: Mapping[str, Any]) -> None:
        if self.metadata is None:
            self.metadata = dict(metadata)
            return
        told = {**self.metadata, **metadata}
        changed = [
            key
            for key in told
            if key not in _MAY_CHANGE and self.metadata.get(key) != metadata.get(key)
        ]
        if changed:
            was, now = (
                ", ".join(f"{key} {ascii(one.get(key))[:80]}" for key in changed[:3])
                for one in (self.metadata, metadata)
            )
            raise ServingError(
                "changed",
                f"{self._server.address} serves another policy than before: it had {was}, now it "
                f"has {now}; make a new RemotePolicy to go on with that one",
            )

    # --- one request -------------------------------------------------------------------------

    @property
    def _names_requests(self) -> bool:
        """Whether the server is one of this project: it takes and tells names, ages, deadlines."""
        return self.metadata is not None and "specification" in self.metadata

    def _age(self, asked: Question) -> float:
        return self._server.clock() - asked.observed

    def _allowed(self, asked: Question) -> float:
        """Seconds of age; without a deadline of its own, what the server told."""
        if asked.deadline_s is not None:
            return asked.deadline_s
        told = (self.metadata or {}).get("deadline_ms") if self._names_requests else None
        return told / 1e3 if isinstance(told, int | float) and told >= 0 else math.inf

    def _expires(self, asked: Question) -> float:
        return asked.observed + self._allowed(asked)

    def _require_in_time(self, asked: Question, when: str) -> None:
        age_s, allowed_s = self._age(asked), self._allowed(asked)
        if age_s >= allowed_s:
            raise ServingError(
                "stale",
                f"the observation was {1e3 * age_s:.0f} ms old when {when}, the deadline allows "
                f"{1e3 * allowed_s:.0f} ms; observe again",
            )

    def _message(self, asked: Question) -> bytes:
        if not self._names_requests:
            for what, given in (("noise", asked.noise), ("previous", asked.left_over)):
                if given is not None:
                    raise ServingError(
                        "bad_request", f"{self._server.address} does not say that it takes {what}"
                    )
            return encode(dict(asked.content))
        control: dict[str, Any] = {"request_id": asked.request_id, "age_ms": 1e3 * self._age(asked)}
        if asked.deadline_s is not None:
            control["deadline_ms"] = 1e3 * asked.deadline_s
        if asked.noise is not None:
            control["noise"] = asked.noise
        if asked.left_over is not None:
            control |= {"previous": asked.left_over.actions, "delay": asked.left_over.delay}
        return encode({**asked.content, **control})

    def _answer(self, call: _Call, asked: Question, *, again: bool = False) -> str | bytes:
        """Send a request as old as it is now, and wait for one message.

        Raises:
            GoneError: the connection was lost; the second time ``unreachable``.
        """
        self._require_in_time(asked, "it could be sent")
        connection = self._take(call, self._expires(asked))
        try:
            self._require_in_time(asked, "it could be sent")
            message = self._message(asked)
        except ServingError:
            self._give_back(call)  # nothing was sent
            raise
        left_s = min(self._server.retry_policy.reply_s, self._allowed(asked) - self._age(asked))
        until = self._server.clock() + left_s
        try:
            connection.send(message, until)
            return connection.receive(until)
        except ExpiredError as error:
            self._require_in_time(asked, "no answer had come")
            raise ServingError(
                "timeout", f"{self._server.address} did not answer within {left_s:g} s"
            ) from error
        except GoneError as error:
            self._raise_if_ended()
            if not again:
                raise
            raise ServingError("unreachable", f"{self._server.address}: {error}") from error

    def _understood(self, answer: str | bytes, asked: Question) -> dict[str, Any] | ServingError:
        """The reply or the server's error, if it is an answer to this request.

        Raises:
            ServingError: ``bad_reply``, ``changed``; the connection is not used again.
        """
        if isinstance(answer, str):
            error, name = _explained(answer)
            if name is not None:  # of a message that it could not read a server knows no name
                self._require_name(name, asked)
            return error
        try:
            reply = decode_map(answer)
        except WireError as error:
            raise _bad(str(error)) from error
        if self._names_requests:
            self._require_name(reply.get("request_id"), asked)
            self._require_same({**(self.metadata or {}), "artifact": reply.get("artifact")})
        actions = reply.get("actions")
        if not isinstance(actions, np.ndarray) or actions.ndim != 2:
            raise _bad("the reply has no 'actions' [horizon, action_dim]")
        self._require_shape(cast(npt.NDArray[Any], actions))
        return reply

    def _require_name(self, name: Any, asked: Question) -> None:
        if name != asked.request_id:
            raise _bad(
                f"the reply is to request {ascii(name)[:80]}, this one is {asked.request_id!r}"
            )

    def _require_shape(self, actions: npt.NDArray[Any]) -> None:
        numbers = np.issubdtype(actions.dtype, np.number)
        if not numbers or not bool(np.isfinite(actions).all()):
            raise _bad("the actions are not finite numbers")
        if self._names_requests:
            specification = (self.metadata or {})["specification"]
            expected = [specification["horizon"], specification["action_dim"]]
            if list(actions.shape) != expected:
                raise _bad(f"the actions have shape {list(actions.shape)}, expected {expected}")


def _bad(reason: str) -> ServingError:
    return ServingError("bad_reply", f"{reason}; it is not used")


def _explained(text: str) -> tuple[ServingError, Any]:
    """The server's own error, and the request it names."""
    try:
        content = json.loads(text)
        error = ServingError(str(content["error"]), str(content["message"]))
        return error, content.get("request_id")
    except (ValueError, TypeError, KeyError, AttributeError):
        return ServingError("internal", text[:500]), None
