"""A policy of a few lines behind the real server, and the embedded one behind the command line."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from omega_qvla.errors import ObservationError, ServingError
from omega_qvla.serving.server.safety import ActionLimits
from omega_qvla.serving.server.scheduler import BatchingConfig, BatchScheduler
from omega_qvla.serving.wire.specification import Specification, parse_request

SPECIFICATION = Specification(
    cameras=("base", "wrist"),
    state_dim=4,
    horizon=5,
    action_dim=3,
    noise_shape=(5, 3),
    state_parts=(("arm", 3), ("gripper", 1)),
    action_parts=(("arm", 2), ("gripper", 1)),
)
LIMITS = ActionLimits((-10.0,) * 3, (10.0,) * 3, (np.inf,) * 3)
ARTIFACT = "abc123"
BATCHING = BatchingConfig(batch=2, waiting=2, deadline_s=5.0)


class FakeEngine:
    """Actions are the first numbers of the state; a prompt can ask for trouble.

    What is left over comes back as it was, plus its delay.

    Attributes:
        seconds: how long one batch takes.
        sizes: of the batches so far.
        gate: while it is not set, batches wait.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def prepare_thread(self) -> None:
        pass

    def encode(self, observation: Mapping[str, Any], left_over: Any = None) -> Any:
        if observation["prompt"] == "unknown word":
            raise ObservationError("the prompt has words this policy was never taught")
        return {**observation, "left_over": left_over}

    def sample(self, inputs: Sequence[Any], noises: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.started.set()
        self.gate.wait(10)
        time.sleep(self.seconds)
        self.sizes.append(len(inputs))
        return [self._one(one, noise) for one, noise in zip(inputs, noises, strict=True)]

    def _one(self, observation: Mapping[str, Any], noise: np.ndarray) -> np.ndarray:
        prompt = observation["prompt"]
        if prompt == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        if prompt == "bug":
            raise KeyError("secret inside")
        chunk = np.tile(observation["state"][:3], (5, 1)) + (noise if prompt == "noise" else 0)
        left_over = observation["left_over"]
        if left_over is not None:
            chunk[: len(left_over.actions)] = left_over.actions + left_over.delay
        if prompt == "nan":
            chunk[2, 1] = np.nan
        if prompt == "far":
            chunk[4, 2] = 11.0
        return chunk.astype(np.float32)


def make_scheduler(
    engine: FakeEngine | None = None,
    *,
    batching: BatchingConfig = BATCHING,
    limits: ActionLimits = LIMITS,
    **options: Any,
) -> BatchScheduler:
    """A scheduler that is not started."""
    return BatchScheduler(
        engine or FakeEngine(),
        options.pop("specification", SPECIFICATION),
        limits,
        artifact=ARTIFACT,
        generator=np.random.default_rng(0),
        batching=batching,
        **options,
    )


def observation(prompt: str = "press", value: float = 0.5, **changes: Any) -> dict[str, Any]:
    """What a robot sends."""
    image = np.zeros((24, 32, 3), np.uint8)
    state = np.full(4, value, np.float32)
    message = {"images": {"base": image, "wrist": image}, "state": state, "prompt": prompt}
    return {key: item for key, item in {**message, **changes}.items() if item is not ...}


def ask(
    scheduler: BatchScheduler, client: object = "robot", timeout: float = 10.0, **changes: Any
) -> Any:
    """Submit one request and wait; returns the reply or the error."""
    return submit(scheduler, client, **changes)(timeout)


def submit(
    scheduler: BatchScheduler, client: object = "robot", **changes: Any
) -> Callable[[float], Any]:
    """Submit one request; returns a function that waits for the outcome."""
    done, found = threading.Event(), []
    request = parse_request(observation(**changes), scheduler.specification)

    def deliver(outcome: Any) -> None:
        found.append(outcome)
        done.set()

    scheduler.submit(client, request, deliver)

    def wait(timeout: float = 10.0) -> Any:
        assert done.wait(timeout), "no answer"
        assert len(found) == 1
        return found[0]

    return wait


class Service:
    """A protocol's server in a thread of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, server: Any) -> None:
        self._server, self._ready = server, threading.Event()
        self.port = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        await self._server.serve(self._stop, self._listening)

    def _listening(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def stop(self) -> None:
        """Ask it to end, without waiting."""
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._stop.set)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join(15)
        assert not self._thread.is_alive() and self.error is None, self.error


@contextmanager
def running(server: Any) -> Any:
    """A service for the length of a block."""
    service = Service(server)
    try:
        yield service
    finally:
        service.stop()
        service.join()


REQUEST = parse_request(observation(), SPECIFICATION)
"""One of a well-behaved robot."""


def code_of(outcome: Any) -> str:
    """The code of an error; fails on a reply."""
    assert isinstance(outcome, ServingError), outcome
    return outcome.code
