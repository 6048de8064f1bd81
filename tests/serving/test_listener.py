"""Connections wait on the doorstep until they have said what they want."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omega_qvla.serving.server.arrivals import Pace, Turnstile
from omega_qvla.serving.server.listener import Doorstep, DoorstepSocket, bind

ONLY_WITH_EPOLL = pytest.mark.skipif(not hasattr(select, "epoll"), reason="needs epoll")
HEAD = b"GET / HTTP/1.1\r\nHost: robot\r\n\r\n"
CLIENT_HELLO = b"\x16\x03\x01\x00\x05hello"


class Taps:
    """So many may come in."""

    def __init__(self, tokens: int, wait_s: float) -> None:
        self.tokens, self.wait_s = tokens, wait_s

    def take(self) -> bool:
        self.tokens -= self.tokens > 0
        return self.tokens > 0


class Guests:
    """A listener of asyncio's, who came in and who was sent away."""

    def __init__(self, pace: Taps, *, silent: int = 64, patience_s: float = 5.0, tls: bool = False):
        self.came: list[asyncio.StreamWriter] = []
        self.sent_away = 0
        self.doorstep = Doorstep(pace, silent, patience_s, tls, self._count)

    def _count(self) -> None:
        self.sent_away += 1

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Callable[..., socket.socket]]:
        """Gives what connects and sends some bytes."""
        (listener,) = await bind("127.0.0.1", 0, self.doorstep)
        address = listener.getsockname()
        opened: list[socket.socket] = []

        def connect(sent: bytes = b"") -> socket.socket:
            one = socket.create_connection(address, timeout=5)
            opened.append(one)
            one.sendall(sent)
            return one

        come = self.came.append
        server = await asyncio.start_server(lambda _, one: come(one), sock=listener, backlog=512)
        try:
            yield connect
        finally:
            for writer in self.came:
                writer.close()
            server.close()
            await server.wait_closed()
            assert listener.fileno() == -1
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            for one in opened:
                one.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that must happen."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            await asyncio.sleep(0.005)


def is_closed(one: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        return one.recv(1) == b""
    return True


@given(
    st.floats(0.1, 1e4),
    st.integers(1, 100),
    st.lists(st.tuples(st.floats(0.0, 10.0), st.integers(1, 50)), min_size=1, max_size=30),
)
def test_never_more_than_the_burst_and_what_time_allows(
    rate: float, burst: int, asked: list[tuple[float, int]]
) -> None:
    now = 0.0
    pace = Pace(rate, burst, lambda: now)
    taken = 0
    for passes, times in asked:
        now += passes
        taken += sum(pace.take() for _ in range(times))
        assert taken <= burst + rate * now + 1e-6 * (1 + taken)


@given(st.floats(0.1, 1e4), st.integers(1, 100))
def test_who_waits_as_long_as_told_gets_a_token(rate: float, burst: int) -> None:
    now = 1e3
    pace = Pace(rate, burst, lambda: now)
    assert [pace.take() for _ in range(burst + 1)] == [True] * burst + [False]
    assert pace.wait_s == pytest.approx(1 / rate)
    now += pace.wait_s * (1 + 1e-6) + 1e-9
    assert pace.take()


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (1.0, 0)])
def test_a_pace_that_lets_nobody_in_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="a pace needs"):
        Pace(rate, burst, lambda: 0.0)


@given(
    st.lists(
        st.tuples(st.floats(0.0, 0.2), st.booleans(), st.integers(1, 20)), min_size=1, max_size=40
    )
)
def test_where_chunks_are_computed_one_comes_in_with_each_or_every_50_ms(
    passes: list[tuple[float, bool, int]],
) -> None:
    """Time passes, a chunk ends or not, several want to come in."""
    now, turn = 0.0, 0
    turnstile = Turnstile(Pace(1e6, 1000, lambda: now), lambda: (turn, 0.0), lambda: now)
    came: list[tuple[float, int]] = []
    for seconds, ends, wanted in passes:
        now, turn = now + seconds, turn + ends
        for _ in range(wanted):
            if turnstile.take():
                came.append((now, turn))
            else:
                assert 0.0 < turnstile.wait_s <= 0.05
    for (before, one), (after, other) in pairwise(came):
        assert other > one or after - before >= 0.05
    assert came[0] == (passes[0][0], int(passes[0][1])), "the first waits for nobody"


def test_where_nobody_is_served_the_pace_is_all_there_is() -> None:
    turnstile = Turnstile(Pace(1.0, 16, lambda: 0.0), lambda: (7, 0.1), lambda: 0.0)
    assert sum(turnstile.take() for _ in range(50)) == 16
    assert turnstile.wait_s == pytest.approx(1.0)


@ONLY_WITH_EPOLL
def test_who_has_not_said_what_it_wants_stays_outside() -> None:
    """In pieces, at once, too long, nothing, gone: only whole heads come in."""

    async def scenario() -> None:
        guests = Guests(Taps(100, 0.1))
        async with guests.listening() as connect:
            connect()
            halves = connect(HEAD[:20])
            connect(HEAD)
            await guests.until(lambda: len(guests.came) == 1)
            connect(bytes(20_000))  # whether that is a request is for HTTP to say
            await guests.until(lambda: len(guests.came) == 2)
            connect(HEAD[:9]).close()
            await asyncio.sleep(0.1)
            assert len(guests.came) == 2
            halves.sendall(HEAD[20:])
            await guests.until(lambda: len(guests.came) == 3)
            assert guests.sent_away == 0

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
def test_the_bytes_that_were_looked_at_are_still_there() -> None:
    async def scenario() -> None:
        received: asyncio.Queue[bytes] = asyncio.Queue()
        doorstep = Doorstep(Taps(9, 0.1), 9, 5.0, False, lambda: None)
        (listener,) = await bind("127.0.0.1", 0, doorstep)

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.put_nowait(await reader.readuntil(b"\r\n\r\n"))
            writer.close()

        server = await asyncio.start_server(talk, sock=listener)
        with socket.create_connection(listener.getsockname()) as one:
            one.sendall(HEAD[:30])
            await asyncio.sleep(0.05)
            one.sendall(HEAD[30:])
            assert await asyncio.wait_for(received.get(), 5) == HEAD
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
def test_of_a_tls_connection_the_first_record_is_the_head() -> None:
    async def scenario() -> None:
        guests = Guests(Taps(100, 0.1), tls=True)
        async with guests.listening() as connect:
            connect(CLIENT_HELLO[:-1])
            connect(CLIENT_HELLO[:3])
            connect(CLIENT_HELLO)
            await guests.until(lambda: len(guests.came) == 1)
            await asyncio.sleep(0.05)
            assert len(guests.came) == 1

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
def test_the_oldest_makes_room_and_who_takes_too_long_is_sent_away() -> None:
    async def scenario() -> None:
        guests = Guests(Taps(100, 0.1), silent=2, patience_s=0.3)
        async with guests.listening() as connect:
            first, second, third = (connect(HEAD[:5]) for _ in range(3))
            await guests.until(lambda: guests.sent_away == 1)
            assert is_closed(first)
            third.sendall(HEAD[5:])
            await guests.until(lambda: len(guests.came) == 1)
            await guests.until(lambda: guests.sent_away == 2)
            assert is_closed(second)

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
def test_what_wants_to_come_in_waits_for_a_token_and_wakes_nobody_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight heads, tokens for three: asyncio asks a fourth time, and then not until it is told."""
    asked = 0
    original = DoorstepSocket.accept

    def accept(self: DoorstepSocket) -> tuple[socket.socket, Any]:
        nonlocal asked
        asked += 1
        return original(self)

    monkeypatch.setattr(DoorstepSocket, "accept", accept)
    pace = Taps(4, wait_s=0.5)

    async def scenario() -> None:
        nonlocal asked
        guests = Guests(pace)
        async with guests.listening() as connect:
            for _ in range(8):
                connect(HEAD)
            await guests.until(lambda: len(guests.came) == 3)
            await asyncio.sleep(0.05)
            asked = 0
            await asyncio.sleep(0.2)
            assert (len(guests.came), asked) == (3, 0)
            pace.tokens = 100
            await guests.until(lambda: len(guests.came) == 8)
            pace.tokens = 1
            connect(HEAD)
            await asyncio.sleep(0.05)
            assert len(guests.came) == 8
        await asyncio.sleep(0.6)  # closed while somebody waited: the bell must not ring

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_what_there_is_no_room_for_stays_with_the_kernel_and_comes_in_later(
    pause_s: float,
) -> None:
    """More heads than may wait, at once and one by one: nobody is lost, and nothing spins."""

    async def scenario() -> None:
        pace = Taps(1, wait_s=0.02)
        guests = Guests(pace)
        async with guests.listening() as connect:
            descriptors = len(os.listdir("/proc/self/fd"))
            for _ in range(300):
                connect(HEAD)
                await asyncio.sleep(pause_s)
            await asyncio.sleep(0.5)
            assert not guests.came
            accepted = len(os.listdir("/proc/self/fd")) - descriptors - 300
            assert 100 < accepted < 160
            spent = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - spent < 0.15
            pace.tokens = 1000
            await guests.until(lambda: len(guests.came) == 300)

    asyncio.run(scenario())


@ONLY_WITH_EPOLL
def test_who_may_come_in_earlier_than_was_said_does() -> None:
    async def scenario() -> None:
        arrivals = Taps(1, wait_s=60.0)
        guests = Guests(arrivals)
        (listener,) = await bind("127.0.0.1", 0, guests.doorstep)
        assert isinstance(listener, DoorstepSocket)
        come = guests.came.append
        server = await asyncio.start_server(lambda _, one: come(one), sock=listener)
        with socket.create_connection(listener.getsockname(), timeout=5) as one:
            one.sendall(HEAD)
            await asyncio.sleep(0.1)
            arrivals.tokens = 9
            await asyncio.sleep(0.1)
            assert not guests.came
            listener.look_again()
            await guests.until(lambda: len(guests.came) == 1)
        guests.came[0].close()
        server.close()
        listener.look_again()  # too late, and no error

    asyncio.run(scenario())


def anybody() -> Doorstep:
    return Doorstep(Pace(1.0, 1, lambda: 0.0), 9, 5.0, False, lambda: None)


def test_every_address_of_a_host_has_the_same_port() -> None:
    async def scenario() -> None:
        sockets = await bind("", 0, anybody())
        try:
            assert len({one.getsockname()[1] for one in sockets}) == 1
            assert len({one.family for one in sockets}) == len(sockets)
        finally:
            for one in sockets:
                one.close()

    asyncio.run(scenario())


def test_an_address_in_use_is_an_error_and_nothing_stays_bound() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(OSError, match=f"127.0.0.1, port {port}: .* in use"):
                await bind("127.0.0.1", port, anybody())
        (one,) = await bind("127.0.0.1", port, anybody())
        one.close()

    asyncio.run(scenario())


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(OSError, match=r"cannot listen on no-such-host\.invalid"):
        asyncio.run(bind("no-such-host.invalid", 0, anybody()))
