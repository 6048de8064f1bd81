"""Whose actions a robot gets: its observation's, with the age it has, or an error."""

from __future__ import annotations

import itertools
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from omega_qvla.errors import OmegaError, ServingError

pytest.importorskip("websockets", reason="the extra serve is not installed")

from scripted_server import HANDSHAKES, WORDS, ScriptedServer, scripted, state

from omega_qvla.serving.client import RemotePolicy, RetryPolicy

HASTY = RetryPolicy(reply_s=0.05, attempts=3, first_pause_s=0.0)
"""A word that stalls costs so much; on a busy machine good answers can be late too."""
CALM = RetryPolicy(reply_s=10.0, attempts=3, first_pause_s=0.0)


class Clock:
    """The monotonic clock, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted() as server:
        yield server


def code(ask: Callable[[], Any]) -> str:
    """How a request ends."""
    try:
        ask()
    except ServingError as error:
        return error.code
    return "answered"


def value_of(reply: dict[str, Any]) -> float:
    assert np.all(reply["actions"] == reply["actions"][0, 0])
    return float(reply["actions"][0, 0])


# --- what is an answer -----------------------------------------------------------------------


ENDINGS = {
    "previous only": "bad_reply",
    "previous first": "bad_reply",
    "foreign": "bad_reply",
    "no name": "bad_reply",
    "foreign error": "bad_reply",
    "garbage": "bad_reply",
    "misshaped": "bad_reply",
    "not finite": "bad_reply",
    "other artifact": "changed",
    "text": "internal",
    "error": "overloaded",
    "twice": "answered",
    "flood": "answered",
    "close": "answered",
    "die": "answered",
}
"""How a request ends by what the server does to it."""
NAMELESS = {word: ENDINGS[word] for word in ("garbage", "not finite", "close", "die", "twice")}
"""Of these, what a server that tells no names can be found out about."""


@pytest.mark.parametrize(
    ("names", "word", "expected"),
    [
        *((True, *ending) for ending in ENDINGS.items()),
        *((False, *ending) for ending in NAMELESS.items()),
        (False, "error", "internal"),
    ],
)
def test_only_the_answer_to_a_request_is_returned(names: bool, word: str, expected: str) -> None:
    """What follows is right whatever came before; a lost connection is made again.

    A server that tells no names is asked on connections with nothing outstanding.
    """
    with (
        scripted(names=names) as server,
        RemotePolicy(server.address, retry_policy=CALM) as policy,
    ):
        assert value_of(policy.infer(state(1.0))) == 1.0
        server.script.append(word)
        assert code(lambda: policy.infer(state(2.0))) == expected
        time.sleep(0.05)  # whatever else it sends has come
        for value in (3.0, 4.0):
            assert value_of(policy.infer(state(value), request_id="mine")) == value
        assert server.open == 1


def test_a_server_that_tells_no_names_gets_the_observation_as_it_is() -> None:
    with scripted(names=False) as openpi, RemotePolicy(openpi.address) as policy:
        reply = policy.infer(state(1.0), request_id="mine", age_ms=5.0, deadline_ms=60_000.0)
        assert reply["request_id"] == "mine"
        with pytest.raises(ServingError, match="noise"):
            policy.infer(state(5.0), noise=np.zeros((5, 3)))
    assert openpi.asked == [(None, None, 1.0)]


def test_requests_have_names_of_their_own_and_the_robots_come_back(server: ScriptedServer) -> None:
    with (
        RemotePolicy(server.address) as policy,
        RemotePolicy(server.address) as other,
    ):
        assert policy.infer(state(1.0), request_id="grasp")["request_id"] == "grasp"
        assert policy.infer({**state(1.0), "request_id": 7})["request_id"] == 7
        named = other.infer(state(1.0))["request_id"]
    names = [name for name, _, _ in server.asked]
    assert len(set(names)) == 3 and named == names[2]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "old"])
@pytest.mark.parametrize("key", ["age_ms", "deadline_ms"])
def test_an_age_that_is_none_is_refused(server: ScriptedServer, key: str, bad: Any) -> None:
    with RemotePolicy(server.address) as policy:
        options: dict[str, Any] = {key: bad}
        with pytest.raises(ServingError, match=key) as refused:
            policy.infer(state(1.0), **options)
        assert refused.value.code == "bad_request" and not server.asked


# --- ages and deadlines ----------------------------------------------------------------------


def test_an_observation_that_is_sent_again_has_the_age_it_has_then(server: ScriptedServer) -> None:
    """Its connection dies, and to find the server again takes two seconds of a clock of ours."""
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.ahead += 2.0

    with RemotePolicy(server.address, clock=clock, sleep=sleep) as policy:
        server.script.append("die")
        server.handshakes.append("die")
        reply = policy.infer(state(1.0), age_ms=100.0, deadline_ms=6000.0)
    (first, young, _), (again, old, _) = server.asked
    assert first == again and 100.0 <= young < 1000.0 and old >= 2100.0
    assert old <= reply["age_ms"] < 6000.0


def test_an_observation_past_its_deadline_is_not_sent_again(server: ScriptedServer) -> None:
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.ahead += 2.0

    with RemotePolicy(server.address, clock=clock, sleep=sleep) as policy:
        server.script.append("die")
        server.handshakes.append("die")
        assert code(lambda: policy.infer(state(1.0), deadline_ms=1500.0)) == "unreachable"
        assert len(server.asked) == 1 and not server.handshakes
        assert value_of(policy.infer(state(2.0))) == 2.0


@pytest.mark.parametrize("names", [True, False])
def test_actions_that_come_past_the_deadline_are_not_returned(names: bool) -> None:
    """With a server that does not know deadlines as with one that keeps them."""
    clock = Clock()
    with scripted(names=names) as server, RemotePolicy(server.address, clock=clock) as policy:
        assert code(lambda: policy.infer(state(1.0), age_ms=100.0, deadline_ms=50.0)) == "stale"
        assert not server.asked
        server.slow_s = 0.3
        server.script.append("slow")
        assert code(lambda: policy.infer(state(1.0), deadline_ms=150.0)) == "stale"
        assert value_of(policy.infer(state(2.0))) == 2.0


def test_without_a_deadline_of_its_own_an_observation_has_the_servers(
    server: ScriptedServer,
) -> None:
    clock = Clock()
    with RemotePolicy(server.address, clock=clock) as policy:
        assert code(lambda: policy.infer(state(1.0), age_ms=59_000.0)) == "answered"
        assert code(lambda: policy.infer(state(1.0), age_ms=61_000.0)) == "stale"
        assert len(server.asked) == 1


def test_nobody_looks_for_a_server_past_the_deadline() -> None:
    """Pauses of 0.1, 0.2, 0.4, … s of a clock of ours; the deadline is half a second."""
    server = ScriptedServer()
    clock = Clock()
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.ahead += seconds

    policy = RemotePolicy(server.address, clock=clock, sleep=sleep)
    server.stop()
    with pytest.raises(ServingError, match="before the observation's deadline") as gone:
        policy.infer(state(1.0), deadline_ms=500.0)
    assert gone.value.code == "unreachable" and pauses == [0.1, 0.2]


def test_a_server_that_does_not_finish_its_handshake_costs_no_more_than_the_deadline(
    server: ScriptedServer,
) -> None:
    with RemotePolicy(server.address) as policy:
        server.drop()
        server.handshakes.extend(["silent"] * 3)
        started = time.monotonic()
        assert code(lambda: policy.infer(state(1.0), deadline_ms=200.0)) == "unreachable"
        assert time.monotonic() - started < 5.0, "not the 30 s of its retry_policy"


def test_a_server_that_reads_nothing_costs_no_more_than_the_deadline(
    server: ScriptedServer,
) -> None:
    """A message larger than the sockets' buffers, to a server that is busy with another one."""
    with RemotePolicy(server.address) as policy:
        server.slow_s = 3.0
        server.script.append("slow")
        large = {**state(1.0), "image": np.zeros(12 << 20, np.uint8)}
        assert code(lambda: policy.infer(large, deadline_ms=300.0)) == "stale"
        assert value_of(policy.infer(state(2.0))) == 2.0


# --- another policy --------------------------------------------------------------------------


@pytest.mark.parametrize("names", [True, False])
def test_a_server_that_comes_back_with_another_policy_is_an_error(names: bool) -> None:
    """Until it is back with the one that the robot was started with."""
    with scripted(names=names) as server, RemotePolicy(server.address) as policy:
        assert value_of(policy.infer(state(1.0))) == 1.0
        server.artifact = "two"
        server.drop()
        for _ in range(2):
            with pytest.raises(ServingError, match=r"'one'.*'two'.*new RemotePolicy") as changed:
                policy.infer(state(2.0))
            assert changed.value.code == "changed"
        with RemotePolicy(server.address) as another:
            assert value_of(another.infer(state(3.0))) == 3.0
        server.artifact = "one"
        assert value_of(policy.infer(state(4.0))) == 4.0


# --- interrupted -----------------------------------------------------------------------------


class Interrupt(BaseException):
    """Not an ``Exception``: as KeyboardInterrupt is not."""


class Watchdog(Exception):  # noqa: N818
    """As a signal's handler raises it."""


def raising_at(number: int, error: type[BaseException]) -> Callable[..., Any]:
    """A trace function that raises at the so-manieth line of the client's modules."""
    passed = itertools.count(1)

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(("session.py", "remote_policy.py", "connection.py")):
            return None
        if event == "line" and next(passed) == number:
            raise error
        return trace

    return trace


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("error", [Interrupt, TimeoutError])
@pytest.mark.parametrize("lost", [False, True])
def test_wherever_a_call_is_interrupted_the_next_one_gets_its_own_actions(
    names: bool, error: type[BaseException], lost: bool
) -> None:
    """At every line that a call passes, with its connection or without; none is left open."""
    values = itertools.count(1.0)
    ended: Counter[str] = Counter()
    with scripted(names=names) as server:
        with RemotePolicy(server.address, retry_policy=CALM, sleep=lambda _: None) as policy:
            for number in itertools.count(1):
                if lost:
                    server.drop()
                value = next(values)
                sys.settrace(raising_at(number, error))
                try:
                    assert value_of(policy.infer(state(value))) == value
                    ended["answered"] += 1
                except ServingError as refused:
                    ended[refused.code] += 1
                except error:
                    ended["interrupted"] += 1
                finally:
                    sys.settrace(None)
                value = next(values)
                assert value_of(policy.infer(state(value))) == value
                if ended["answered"] >= 3:
                    break
        until = time.monotonic() + 5.0
        while server.open and time.monotonic() < until:
            time.sleep(0.01)
        assert server.open == 0, "every connection was ended"
    assert ended["interrupted"] > 40 and ended["answered"] >= 3


def interrupted_requests(server: ScriptedServer, count: int, seed: int) -> Counter[str]:
    """Requests to a server that does anything, each with a signal at some moment of it.

    Returns:
        How they ended; ``wrong`` is a chunk of another observation.
    """
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()

    def ring(*_: Any) -> None:
        raise Watchdog

    before = signal.signal(signal.SIGALRM, ring)
    try:
        policy = RemotePolicy(server.address, retry_policy=HASTY)
        for number in range(1, count + 1):
            if chance.random() < 0.5:
                server.script.append(chance.choice(WORDS))
            if chance.random() < 0.2:
                server.handshakes.append(chance.choice(HANDSHAKES))
            if chance.random() < 0.05:
                server.drop()
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.choice([0.0, 0.0, 5e-4, 2e-3, 8e-3]))
                reply = policy.infer(state(float(number)), deadline_ms=200.0)
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                right = value_of(reply) == number and reply["age_ms"] < 200.0
                outcomes["right" if right else "wrong"] += 1
            except ServingError as error:
                outcomes[error.code] += 1
            except Watchdog:
                outcomes["interrupted"] += 1
            finally:
                while True:  # the signal may come before this line has stopped it
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0.0)
                        break
                    except Watchdog:
                        continue
        policy.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return outcomes


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_interrupted_request_gives_a_stale_or_foreign_chunk(
    server: ScriptedServer, count: int
) -> None:
    outcomes = interrupted_requests(server, count, seed=count)
    print(dict(outcomes))
    assert sum(outcomes.values()) == count and outcomes["wrong"] == 0
    assert outcomes["right"] >= count // 50 and outcomes["interrupted"] >= count // 20
    until = time.monotonic() + 5.0
    while server.open and time.monotonic() < until:
        time.sleep(0.01)
    assert server.open == 0


# --- other threads ---------------------------------------------------------------------------


def in_thread(ask: Callable[[], Any]) -> tuple[threading.Thread, list[str]]:
    heard: list[str] = []
    thread = threading.Thread(target=lambda: heard.append(code(ask)))
    thread.start()
    return thread, heard


def wait_for_request(server: ScriptedServer, number: int) -> None:
    until = time.monotonic() + 10.0
    while len(server.asked) < number and time.monotonic() < until:
        time.sleep(0.002)
    assert len(server.asked) >= number


def test_a_second_thread_is_refused_while_one_asks(server: ScriptedServer) -> None:
    with RemotePolicy(server.address) as policy:
        server.script.append("stall")
        thread, heard = in_thread(lambda: policy.infer(state(1.0), deadline_ms=20_000.0))
        wait_for_request(server, 1)
        assert code(lambda: policy.infer(state(2.0))) == "busy"
        policy.abandon()
        thread.join(5)
        assert heard == ["abandoned"]
        assert value_of(policy.infer(state(3.0))) == 3.0


def test_what_is_abandoned_ends_at_once_and_reaches_no_later_call(server: ScriptedServer) -> None:
    """Its answer leaves the server while the next one is asked for."""
    with RemotePolicy(server.address) as policy:
        server.slow_s = 0.3
        server.script.extend(["slow", "slow"])
        thread, heard = in_thread(lambda: policy.infer(state(1.0)))
        wait_for_request(server, 1)
        started = time.monotonic()
        policy.abandon()
        assert time.monotonic() - started < 0.2
        assert value_of(policy.infer(state(2.0))) == 2.0
        thread.join(5)
        assert heard == ["abandoned"] and policy.reconnections == 1


def test_a_policy_that_was_closed_fails_whoever_asks(server: ScriptedServer) -> None:
    policy = RemotePolicy(server.address)
    server.script.append("stall")
    thread, heard = in_thread(lambda: policy.infer(state(1.0)))
    wait_for_request(server, 1)
    policy.close()
    thread.join(5)
    assert heard == ["closed"] and code(lambda: policy.infer(state(2.0))) == "closed"
    policy.close()


def test_a_handler_that_asks_gets_its_own_actions(server: ScriptedServer) -> None:
    """A signal's handler in the thread that waits: the call it broke into is asked again."""
    values: list[float] = []
    with RemotePolicy(server.address) as policy:

        def ring(*_: Any) -> None:
            values.append(value_of(policy.infer(state(2.0))))

        before = signal.signal(signal.SIGALRM, ring)
        try:
            server.slow_s = 0.2
            server.script.append("slow")
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert value_of(policy.infer(state(1.0))) == 1.0
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        assert values == [2.0] and value_of(policy.infer(state(3.0))) == 3.0


# --- anything, in any order ------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """A robot and a server that is restarted, lies, and serves another policy now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.server = ScriptedServer()
        self.policy = RemotePolicy(self.server.address, retry_policy=HASTY, sleep=lambda _: None)
        self.values = itertools.count(1.0)

    def teardown(self) -> None:
        self.policy.close()
        self.server.stop()

    def ask(self, deadline_ms: float = 2000.0) -> None:
        value = next(self.values)
        served = self.server.artifact
        try:
            reply = self.policy.infer(state(value), deadline_ms=deadline_ms)
        except OmegaError as error:
            assert isinstance(error, ServingError)
            return
        assert value_of(reply) == value and reply["age_ms"] < deadline_ms
        assert served == "one", "another policy's actions"

    @rule(words=st.lists(st.sampled_from(WORDS), max_size=3))
    def misbehave(self, words: list[str]) -> None:
        self.server.script.extend(words)

    @rule(words=st.lists(st.sampled_from(HANDSHAKES), max_size=3))
    def greet_badly(self, words: list[str]) -> None:
        self.server.handshakes.extend(words)

    @rule(deadline_ms=st.sampled_from([0.0, 30.0, 2000.0]))
    def request(self, deadline_ms: float) -> None:
        self.ask(deadline_ms)

    @rule(number=st.integers(1, 120), error=st.sampled_from([Interrupt, Watchdog]))
    def interrupted_request(self, number: int, error: type[BaseException]) -> None:
        sys.settrace(raising_at(number, error))
        try:
            self.ask()
        except error:
            pass
        finally:
            sys.settrace(None)

    @rule()
    def lose_the_connection(self) -> None:
        self.server.drop()

    @rule()
    def restart(self) -> None:
        self.server.stop()
        old, self.server = self.server, ScriptedServer(self.server.port)
        self.server.artifact = old.artifact

    @rule(artifact=st.sampled_from(["one", "two"]))
    def serve_another_policy(self, artifact: str) -> None:
        self.server.artifact = artifact
        self.server.drop()

    @rule()
    def abandon(self) -> None:
        self.policy.abandon()

    @precondition(lambda self: not self.server.script and not self.server.handshakes)
    @invariant()
    def when_all_is_well_a_request_is_answered(self) -> None:
        """Unless the answer was late on a busy machine, or another policy is served."""
        if self.server.artifact == "one":
            self.ask()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
