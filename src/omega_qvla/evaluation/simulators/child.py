"""A process of ours and the channel to it: start, talk, notice death.

Each process owns one end of a socket pair, so its death, however sudden, shows as the end of the
stream.  Processes live in their own session: Ctrl-C reaches only the parent, which stops them.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from omega_qvla.errors import SimulatorUnavailable
from omega_qvla.evaluation.simulators.channel import Channel

_PATIENCE_S = 3600.0
"""Longest single wait: ``select`` takes no infinite one."""


class Child:
    """One running process and the channel to it.

    Args:
        program: Python source; its first argument is the socket's descriptor.
        arguments: further arguments of the program.
        timeout_s: a process that owes a reply and is silent for longer counts as dead.
        python: the interpreter; this one by default.

    Raises:
        SimulatorUnavailable: the interpreter cannot be started.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        timeout_s: float,
        python: str = sys.executable,
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [python, "-c", program, str(theirs.fileno()), *arguments],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise SimulatorUnavailable(f"cannot start {python}: {error}") from error
        self.channel = Channel(ours)
        self.channel.settimeout(timeout_s)
        self._timeout_s = timeout_s
        self._deadline = 0.0

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.poll() is None

    @property
    def seconds_left(self) -> float:
        """How much longer the awaited reply may take."""
        return self._deadline - time.monotonic()

    def request(self, message: Mapping[str, Any]) -> None:
        """Send a request; the reply is expected within the timeout.

        Raises:
            ChannelError: the process is gone.
        """
        self.channel.send(message)
        self._deadline = time.monotonic() + self._timeout_s

    def kill(self) -> None:
        """End the process at once."""
        self.channel.close()
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float) -> str:
        """Let a process that should end do so, or kill it; returns how it ended."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"


SomeChild = TypeVar("SomeChild", bound=Child)


def wait_for_replies(busy: Iterable[SomeChild]) -> tuple[list[SomeChild], list[SomeChild]]:
    """Block until a process answers, dies or exceeds its time.

    Returns:
        Those with something to read (a reply or the end of the stream), and those too late.
    """
    waiting = list(busy)
    with selectors.DefaultSelector() as selector:
        for child in waiting:
            selector.register(child.channel, selectors.EVENT_READ, child)
        soonest = min(child.seconds_left for child in waiting)
        patience = min(max(0.0, soonest), _PATIENCE_S)
        ready = [cast(SomeChild, key.data) for key, _ in selector.select(patience)]
    late = [one for one in waiting if one not in ready and one.seconds_left <= 0]
    return ready, late
