"""Simulator processes as the evaluation holds them: start, talk, notice death, replace.

Each process owns one end of a socket pair, so its death, however sudden, shows as the end of the
stream.  Processes live in their own session: Ctrl-C reaches only the parent, which stops them.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, cast

from omega_qvla.evaluation.channel import Channel
from omega_qvla.evaluation.worker import BOOTSTRAP

METAWORLD = "omega_qvla.evaluation.metaworld:MetaWorldEnv"
_SHUTDOWN_S, _DEATH_S = 3.0, 0.3


class Simulator:
    """One running simulator process and the channel to it."""

    def __init__(self, timeout_s: float) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, str(theirs.fileno()), *sys.path],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.channel = Channel(ours)
        self.channel.settimeout(timeout_s)
        self.task: str | None = None
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
        """Let a process that has lost its channel end, or kill it; returns how it ended."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return "stopped answering"
        return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"


class SimulatorPool:
    """At most ``workers`` simulator processes, started when needed and kept between evaluations.

    Args:
        workers: number of processes.
        environment: factory as ``module:callable``, called as ``factory(task, **options)`` in the
            simulator process; it returns an object with ``reset(seed)``, ``step(action)``,
            ``observe()``, ``close()`` and ``max_steps`` (see ``metaworld.MetaWorldEnv``).
        options: keyword arguments of the factory, JSON values.
        timeout_s: a simulator silent for longer counts as dead; building an environment included.
    """

    def __init__(
        self,
        workers: int = 2,
        environment: str = METAWORLD,
        options: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = 300.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"an evaluation needs at least one worker, got {workers}")
        self.workers = workers
        self.environment = environment
        self.options: dict[str, Any] = dict(options or {})
        self._timeout_s = timeout_s
        self._simulators: list[Simulator] = []

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close() if kind is None else self.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running simulators."""
        return [simulator.pid for simulator in self._simulators if simulator.alive]

    def idle(self, busy: Iterable[Simulator], limit: int) -> list[Simulator]:
        """Living simulators that are not busy, after starting as many as ``limit`` allows."""
        taken = {id(simulator) for simulator in busy}
        for simulator in list(self._simulators):
            if id(simulator) not in taken and not simulator.alive:
                self.discard(simulator)
        while len(self._simulators) < min(self.workers, limit):
            self._simulators.append(Simulator(self._timeout_s))
        return [simulator for simulator in self._simulators if id(simulator) not in taken]

    def start(self, simulator: Simulator, task: str, seed: int) -> None:
        """Ask a simulator to begin an episode.

        Raises:
            ChannelError: the process is gone.
        """
        simulator.task = task
        episode = {"task": task, "seed": seed}
        simulator.request(
            {"start": {"environment": self.environment, "options": self.options, **episode}}
        )

    def discard(self, simulator: Simulator) -> str:
        """Kill a simulator and forget it; returns how it had ended."""
        self._simulators.remove(simulator)
        simulator.channel.close()
        return simulator.wait(_DEATH_S)

    def close(self) -> None:
        """Let every simulator finish and clean up."""
        for simulator in self._simulators:
            simulator.channel.close()
        for simulator in self._simulators:
            simulator.wait(_SHUTDOWN_S)
        self._simulators.clear()

    def kill(self) -> None:
        """End every simulator at once; the pool can be used again."""
        while self._simulators:
            self._simulators.pop().kill()


def wait_for_replies(busy: Iterable[Simulator]) -> tuple[list[Simulator], list[Simulator]]:
    """Block until a simulator answers, dies or exceeds its time.

    Returns:
        Those with something to read (a reply or the end of the stream), and those too late.
    """
    waiting = list(busy)
    with selectors.DefaultSelector() as selector:
        for simulator in waiting:
            selector.register(simulator.channel, selectors.EVENT_READ, simulator)
        patience = max(0.0, min(simulator.seconds_left for simulator in waiting))
        ready = [cast(Simulator, key.data) for key, _ in selector.select(patience)]
    late = [one for one in waiting if one not in ready and one.seconds_left <= 0]
    return ready, late
