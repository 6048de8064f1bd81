"""Listening sockets on whose doorstep connections wait until they have said what they want.

asyncio accepts everything that waits in one turn of its loop.  A connection costs the loop about
half a millisecond (its transport, its tasks, its timers, its handshake), so a thousand at once keep
a robot that is served already waiting for half a second, and so the thread that computes its
actions, which waits for Python's lock.  Two things keep that away from the loop:

* **who has not sent the head of its request waits outside**, as a bare socket that costs a few
  dozen microseconds in all: its bytes stay in the kernel, which is asked (``MSG_PEEK``) whether the
  head is complete.  There are so many at most, the oldest makes room for the next, and who takes
  too long is sent away;
* **who has sent it comes in at a bounded rate** (``arrivals.py``).

asyncio asks a listening socket two things: the descriptor to watch (``fileno``), and ``accept``
until that would block.  The descriptor it gets is an epoll object's, which watches in turn the real
socket, the connections on the doorstep, and a bell that rings when somebody may come in again.
Where there is no epoll (outside Linux) connections come in as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omega_qvla.serving.server.arrivals import Arrivals

_HAS_EPOLL = hasattr(select, "epoll")

_LONGEST_HEAD = 16384
"""Bytes after which a head is not waited for: whether it is too long is for HTTP to say."""

_AT_ONCE, _REST_S = 16, 0.02
"""Connections taken from the kernel, and the pause before the next ones: a thousand that come
together take a twentieth of a processor for a second, not a whole one for a moment."""

_ANNOUNCED = 128
"""Connections that have sent a head and may not come in yet; the kernel keeps the rest."""

_SWEEP_S = 0.25

Connection = tuple[socket.socket, Any]
"""A socket and its peer's address."""


@dataclass(frozen=True)
class Doorstep:
    """What holds for who has not come in yet.

    Attributes:
        arrivals: says who may come in now; may be shared by several sockets.
        silent: connections that have not sent a head at most, of one socket.
        patience_s: how long a head may take to arrive.
        tls: whether the head is that of a TLS handshake, not of an HTTP request.
        sent_away: called for every connection that was closed for the two bounds before.
    """

    arrivals: Arrivals
    silent: int
    patience_s: float
    tls: bool
    sent_away: Callable[[], None]

    def has_head(self, begin: bytes) -> bool:
        """Whether a connection's first bytes say what it wants."""
        if len(begin) >= _LONGEST_HEAD:
            return True
        if self.tls:  # a record: type, version, length (RFC 8446, section 5.1)
            return len(begin) >= 5 + int.from_bytes(begin[3:5], "big")
        return b"\r\n\r\n" in begin


class DoorstepSocket(socket.socket):
    """A TCP socket whose ``accept`` gives connections that have sent a head.  Needs epoll.

    Args:
        family: of its address.
        doorstep: what holds for who waits.
    """

    def __init__(self, family: int, doorstep: Doorstep) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._doorstep = doorstep
        self._waiting: dict[int, tuple[Connection, float]] = {}
        self._announced: deque[Connection] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watched = select.epoll()
        self._watched.register(super().fileno(), select.EPOLLIN)
        self._watched.register(self._bell, select.EPOLLIN)
        self._rings: asyncio.TimerHandle | None = None
        self._rests: asyncio.TimerHandle | None = None
        self._sweeps: asyncio.TimerHandle | None = None
        self._watches_kernel = True

    def fileno(self) -> int:
        """What to watch: readable while ``accept`` has something to do; -1 once closed."""
        return -1 if self._watched.closed else self._watched.fileno()

    def accept(self) -> Connection:
        """The next connection that has sent a head.

        Raises:
            BlockingIOError: there is none, or none may come in yet.
            OSError: the system has no descriptor left, say.
        """
        self._look()
        if not self._announced:
            raise BlockingIOError(errno.EAGAIN, "nobody wants to come in")
        if not self._doorstep.arrivals.take():
            if self._rings is None:
                loop = asyncio.get_running_loop()
                self._rings = loop.call_later(self._doorstep.arrivals.wait_s, self._ring)
            raise BlockingIOError(errno.EAGAIN, "nobody may come in yet")
        first = self._announced.popleft()
        self._watch_kernel()
        return first

    def look_again(self) -> None:
        """Somebody may come in earlier than was said; in the event loop's thread."""
        if self._announced and not self._watched.closed:
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Stop listening, and send away who has not come in."""
        if self._watched.closed:
            return
        for timer in (self._rings, self._rests, self._sweeps):
            if timer is not None:
                timer.cancel()
        self._watched.close()
        os.close(self._bell)
        for (one, _), _ in self._waiting.values():
            one.close()
        for one, _ in self._announced:
            one.close()
        self._waiting.clear()
        self._announced.clear()
        super().close()

    def _look(self) -> None:
        """Whatever has happened since the last time."""
        for descriptor, _ in self._watched.poll(0):
            if descriptor == self._bell:
                os.eventfd_read(self._bell)
            elif descriptor in self._waiting:
                self._listen_to(descriptor)
            else:
                self._take_in()

    def _take_in(self) -> None:
        """Connections from the kernel's queue."""
        for _ in range(_AT_ONCE):
            try:
                one, address = super().accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            one.setblocking(False)
            descriptor = one.fileno()
            self._waiting[descriptor] = (one, address), asyncio.get_running_loop().time()
            # Edge-triggered: bytes that stay in the kernel must not wake anybody twice.
            self._watched.register(descriptor, select.EPOLLIN | select.EPOLLET)
            self._listen_to(descriptor)
            if len(self._waiting) > self._doorstep.silent:
                self._send_away(next(iter(self._waiting)))
            self._sweep_later()
        else:
            self._rests = asyncio.get_running_loop().call_later(_REST_S, self._rested)
        self._watch_kernel()

    def _listen_to(self, descriptor: int) -> None:
        """Look at a connection's first bytes."""
        (one, address), _ = self._waiting[descriptor]
        try:
            begin = one.recv(_LONGEST_HEAD, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            begin = b""
        if not begin:
            self._forget(descriptor).close()
        elif self._doorstep.has_head(begin):
            self._announced.append((self._forget(descriptor), address))

    def _forget(self, descriptor: int) -> socket.socket:
        self._watched.unregister(descriptor)
        (one, _), _ = self._waiting.pop(descriptor)
        return one

    def _send_away(self, descriptor: int) -> None:
        self._forget(descriptor).close()
        self._doorstep.sent_away()

    def _watch_kernel(self) -> None:
        """Look at the kernel's queue, unless that has just been done or there is no room."""
        watches = self._rests is None and len(self._announced) < _ANNOUNCED
        if watches != self._watches_kernel:
            self._watches_kernel = watches
            self._watched.modify(super().fileno(), select.EPOLLIN if watches else 0)

    def _rested(self) -> None:
        self._rests = None
        self._watch_kernel()

    def _ring(self) -> None:
        self._rings = None
        os.eventfd_write(self._bell, 1)

    def _sweep_later(self) -> None:
        if self._sweeps is None and self._waiting:
            self._sweeps = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Send away whose head has taken too long: the oldest are first."""
        limit = asyncio.get_running_loop().time() - self._doorstep.patience_s
        late = [descriptor for descriptor, (_, since) in self._waiting.items() if since < limit]
        for descriptor in late:
            self._send_away(descriptor)
        self._sweeps = None
        self._sweep_later()


async def bind(host: str, port: int, doorstep: Doorstep) -> list[socket.socket]:
    """Sockets bound to every address of a host, not listening yet.

    Args:
        host: a name or an address; empty for all interfaces.
        port: or 0, and the system chooses one for all of them.
        doorstep: of each.

    Raises:
        OSError: the host is unknown or an address cannot be used.
    """
    with contextlib.ExitStack() as unless_bound:
        bound: list[socket.socket] = []
        try:
            for family, address in await _addresses(host, port):
                one = DoorstepSocket(family, doorstep) if _HAS_EPOLL else socket.socket(family)
                unless_bound.callback(one.close)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                chosen = bound[0].getsockname()[1] if bound else port
                one.bind((address[0], chosen, *address[2:]))
                bound.append(one)
        except OSError as error:
            advice = "is another server there? choose another host or port"
            text = f"cannot listen on {host or 'all interfaces'}, port {port}: {error.strerror}"
            raise OSError(error.errno, f"{text}; {advice}") from error
        unless_bound.pop_all()
    return bound


async def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and socket addresses of a host, none twice."""
    found = await asyncio.get_running_loop().getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return list(dict.fromkeys((family, address) for family, *_, address in found))
