from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import omega_qvla as oq


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded policy, quantized with the quickest recipe."""
    policy = oq.load_policy("builtin:tiny-pi05")
    observations = list(oq.Observations.load("builtin:tiny-pi05"))[:4]
    quantized = oq.quantize(policy, observations, recipe="rtn")
    return quantized.save_pretrained(tmp_path_factory.mktemp("serving") / "artifact")


class Server:
    """``omega-qvla serve`` in a process of its own, from its first line to its end."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "omega_qvla.cli", "serve", *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.events: list[dict[str, Any]] = []

    def wait_for(self, event: str) -> dict[str, Any]:
        """Read the log up to an event."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"ended without {event!r}: {self._process.communicate()[1]}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the exit status and what was written to standard error."""
        os.kill(self.pid, number)
        rest, errors = self._process.communicate(timeout=30)
        self.events += [json.loads(line) for line in rest.splitlines()]
        return self._process.returncode, errors

    def kill(self) -> None:
        """Whatever happened, leave nothing behind."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def serve_command() -> Iterator[Callable[..., Server]]:
    """Starts ``omega-qvla serve``."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.kill()
