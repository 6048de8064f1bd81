"""Closed-loop evaluation with paired seeds.

An episode is a (task, seed).  The policy is asked for a chunk of actions, the first ``execute`` of
them are carried out, then it is asked again with the new observation, until the simulator reports
success or the task's steps are used up.  Everything random is a function of the episode: the
simulator is reset with ``seed``, and chunk k starts from noise drawn by a generator seeded with
(seed, k).  Two methods evaluated on the same episodes are therefore *paired*.

Physics and rendering run in simulator processes; the policy stays here.  One policy object serves
all simulators, whatever its type or device, and the result does not depend on how many there are.

A small policy spends its time on overhead, so episodes may advance **together**: consecutive seeds
of a task form a group, and when every running episode of a group has its observation, one pass
computes all their chunks.  The integers of a row do not depend on its neighbours, but sums of
floating-point numbers may be ordered by the size of the batch, and a last bit decides a rounding
now and then.  A group is therefore always the same seeds: it is run again as a whole if any of them
is missing, and its size belongs to the identity of a journal.

A simulator that dies or falls silent is replaced and its group starts again from the seeds; what
the interrupted attempt did is forgotten, so no episode is lost or counted twice.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import (
    NonFiniteError,
    OmegaError,
    PolicyError,
    ResourceError,
    SimulatorError,
    SimulatorUnavailable,
)
from omega_qvla.evaluation.openloop import Sampler, sample_together, shape_of_noise
from omega_qvla.evaluation.simulators.channel import ChannelError
from omega_qvla.evaluation.simulators.child import wait_for_replies
from omega_qvla.evaluation.simulators.pool import Simulator, SimulatorPool
from omega_qvla.results.episodes import EpisodeJournal, EpisodeRecord
from omega_qvla.results.statistics import mean_squared_jerk

Actions = npt.NDArray[np.float32]
Group = tuple[str, tuple[int, ...]]
"""A task and the seeds of its episodes that advance together."""
Observation = dict[str, Any]
Transform = Callable[[Observation], Observation]
Progress = Callable[[int, int], None]

MAX_DEATHS = 3
"""An episode on which this many simulators died is given up with an error."""


class EvaluationError(OmegaError):
    """An evaluation cannot be finished; names the episode."""

    exit_status = 1


@dataclass
class _Attempt:
    """One running episode."""

    task: str
    seed: int
    chunks: int = 0
    limits: tuple[Actions, Actions] | None = None
    """Lowest and highest action of the environment; executed actions are clipped to them."""
    planned: Actions | None = None
    executed: list[Actions] = field(default_factory=list[Actions])
    states: list[list[float]] = field(default_factory=list[list[float]])
    latencies_ms: list[float] = field(default_factory=list[float])

    @property
    def name(self) -> str:
        return f"{self.task}, seed {self.seed}"


@dataclass
class _Group:
    """Episodes of one task that advance together."""

    task: str
    seeds: tuple[int, ...]
    attempts: dict[Simulator, _Attempt] = field(default_factory=dict[Simulator, _Attempt])
    """Those that still run."""
    observed: dict[Simulator, Observation] = field(default_factory=dict[Simulator, Observation])
    """What those saw that wait for the others."""

    @property
    def name(self) -> str:
        plural = "s" if len(self.seeds) > 1 else ""
        return f"{self.task}, seed{plural} {', '.join(map(str, self.seeds))}"


def rollout(
    policy: Sampler,
    tasks: Sequence[str],
    seeds: Iterable[int],
    *,
    pool: SimulatorPool,
    execute: int = 5,
    together: int = 1,
    transform: Transform | None = None,
    journal: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[EpisodeRecord]:
    """Run every task with every seed.

    Args:
        policy: answers ``sample_actions(observation, noise=[horizon, action_dim])``.
        tasks: task names the pool's environment knows.
        seeds: non-negative integers; repeated ones count once.
        pool: the simulators; still usable afterwards, also after an error.
        execute: actions carried out of each chunk before the policy is asked again.
        together: episodes of one task that advance together; the policy answers them in one pass if
            it offers ``sample_batch``.  The pool needs as many simulators.
        transform: changes each observation before the policy sees it, for controls such as
            :func:`blank_images`.
        journal: file of finished episodes; those it holds already are not run again.
        identity: JSON values describing policy and transform, kept in the journal; resuming with
            others is refused.
        progress: called with (finished, total), first with what the journal held.

    Returns:
        One record per episode, ordered by task, then seed, as given.

    Raises:
        SimulatorUnavailable: the simulator cannot be started; names what to install.
        EvaluationError: the simulator failed, or died ``MAX_DEATHS`` times on one episode.
        PolicyError: chunks are shorter than ``execute`` or of the wrong shape.
        ResourceError: the pool has fewer simulators than episodes that advance together.
        NonFiniteError: the policy returned NaN or Inf.
        ResumeError: the journal belongs to another evaluation.
    """
    distinct = list(dict.fromkeys(seeds))
    groups: list[Group] = [
        (task, group) for task in dict.fromkeys(tasks) for group in seed_groups(distinct, together)
    ]
    episodes = [(task, seed) for task, group in groups for seed in group]
    finished: dict[tuple[str, int], EpisodeRecord] = {}
    with ExitStack() as stack:
        book = None
        if journal is not None:
            settings = journal_settings(pool, execute, together, identity)
            book = stack.enter_context(EpisodeJournal(journal, settings))
            finished.update(book.records)

        def report() -> None:
            if progress is not None:
                progress(sum(episode in finished for episode in episodes), len(episodes))

        def keep(record: EpisodeRecord) -> None:
            if record.key not in finished:
                if book is not None:
                    book.append(record)
                finished[record.key] = record
                report()

        report()
        left = [
            (task, group) for task, group in groups if any((task, s) not in finished for s in group)
        ]
        run_groups(
            policy,
            left,
            pool=pool,
            execute=execute,
            together=together,
            transform=transform,
            keep=keep,
        )
    return [finished[episode] for episode in episodes]


def run_groups(
    policy: Sampler,
    groups: Sequence[Group],
    *,
    pool: SimulatorPool,
    execute: int,
    together: int,
    keep: Callable[[EpisodeRecord], None],
    transform: Transform | None = None,
) -> None:
    """Run episodes in groups that advance together.

    Args:
        keep: called with each record as its episode ends; the rest is as in :func:`rollout`.

    Raises:
        As :func:`rollout`, but for ResumeError.
    """
    _Run(policy, pool, execute, together, transform).run(groups, keep)


def chunk_noise(seed: int, number: int, shape: tuple[int, int]) -> Actions:
    """What chunk ``number`` of the episodes with this seed starts from, whatever the policy."""
    generator = np.random.default_rng((seed, number))
    return generator.standard_normal(shape, dtype=np.float32)


def seed_groups(seeds: Sequence[int], together: int) -> list[tuple[int, ...]]:
    """Consecutive seeds, ``together`` at a time; the last group has what is left.

    Raises:
        ValueError: ``together`` is not positive.
    """
    if together < 1:
        raise ValueError(f"at least one episode at a time, got {together}")
    return [tuple(seeds[i : i + together]) for i in range(0, len(seeds), together)]


def journal_settings(
    pool: SimulatorPool, execute: int, together: int, identity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a journal's first line says: everything that fixes the outcome of an episode."""
    return {
        "environment": pool.environment,
        "options": pool.options,
        "execute": execute,
        "together": together,
        "identity": dict(identity or {}),
    }


class _Run:
    """The scheduler: which simulators run which group, and what happens to each reply."""

    def __init__(
        self,
        policy: Sampler,
        pool: SimulatorPool,
        execute: int,
        together: int,
        transform: Transform | None,
    ) -> None:
        self._noise_shape = shape_of_noise(policy)
        horizon = self._noise_shape[0]
        if not 1 <= execute <= horizon:
            raise PolicyError(
                f"cannot execute {execute} actions of chunks with a horizon of {horizon}"
            )
        if pool.workers < together:
            raise ResourceError(
                f"{together} episodes that advance together need as many simulators, and the pool "
                f"has {pool.workers}"
            )
        self._policy = policy
        self._pool = pool
        self._execute = execute
        self._transform: Transform = transform or _unchanged
        self._pending: dict[str, deque[tuple[int, ...]]] = {}
        self._active: dict[Simulator, _Group] = {}
        self._deaths: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def run(self, groups: Sequence[Group], keep: Callable[[EpisodeRecord], None]) -> None:
        """Run them all; any error, Ctrl-C included, stops the simulators."""
        for task, group in groups:
            self._pending.setdefault(task, deque()).append(group)
        try:
            while self._active or any(self._pending.values()):
                for record in self._advance():
                    keep(record)
        except BaseException:
            self._pool.kill()
            raise

    def _advance(self) -> list[EpisodeRecord]:
        """Start what can be started, then handle the replies that have arrived."""
        self._assign()
        if not self._active:
            return []
        ready, late = wait_for_replies(self._active)
        for simulator in late:
            self._bury(simulator)
        records = [self._hear(simulator) for simulator in ready]
        return [record for record in records if record is not None]

    def _assign(self) -> None:
        while True:
            waiting = sum(len(seeds) for groups in self._pending.values() for seeds in groups)
            idle = self._pool.idle(self._active, len(self._active) + waiting)
            task = self._choose_task(idle[0].task) if idle else None
            if task is None or len(idle) < len(self._pending[task][0]):
                return
            idle.sort(key=lambda simulator: simulator.task != task)
            self._begin(_Group(task, self._pending[task].popleft()), idle)

    def _begin(self, group: _Group, idle: Sequence[Simulator]) -> None:
        for seed, simulator in zip(group.seeds, idle, strict=False):
            group.attempts[simulator] = _Attempt(group.task, seed)
            self._active[simulator] = group
        for simulator, attempt in group.attempts.items():
            try:
                self._pool.start(simulator, attempt.task, attempt.seed)
            except ChannelError:
                self._bury(simulator)
                return

    def _choose_task(self, current: str | None) -> str | None:
        """The simulator's present task if it has episodes left, else the least served one."""
        if current is not None and self._pending.get(current):
            return current
        served = Counter(group.task for group in self._active.values())
        open_tasks = [task for task, groups in self._pending.items() if groups]
        if not open_tasks:
            return None
        return max(open_tasks, key=lambda task: len(self._pending[task]) / (1 + served[task]))

    def _hear(self, simulator: Simulator) -> EpisodeRecord | None:
        """Handle one reply; returns a record if it ended the episode."""
        group = self._active.get(simulator)
        if group is None:  # another simulator of its group has just died
            return None
        attempt = group.attempts[simulator]
        record = None
        try:
            reply = simulator.channel.receive()
            if "error" in reply:
                raise _simulator_error(attempt, reply["error"])
            over, success = _account(attempt, reply)
            if over:
                del self._active[simulator], group.attempts[simulator]
                record = self._record(group, attempt, success)
            else:
                group.observed[simulator] = reply["observation"]
        except ChannelError:
            self._bury(simulator)
            return None
        if group.attempts and len(group.observed) == len(group.attempts):
            self._act(group)
        return record

    def _act(self, group: _Group) -> None:
        """Everyone waits for actions: plan all chunks, and send each simulator its own."""
        attempts = list(group.attempts.items())
        observations = [group.observed[simulator] for simulator, _ in attempts]
        group.observed.clear()
        self._plan([attempt for _, attempt in attempts], observations)
        for simulator, attempt in attempts:
            try:
                simulator.request({"actions": attempt.planned})
            except ChannelError:
                self._bury(simulator)
                return

    def _plan(self, attempts: Sequence[_Attempt], observations: Sequence[Observation]) -> None:
        """Ask the policy for the next chunk of each episode."""
        seen = [self._transform(observation) for observation in observations]
        noises = [
            chunk_noise(attempt.seed, attempt.chunks, self._noise_shape) for attempt in attempts
        ]
        started = time.perf_counter()
        chunks = sample_together(self._policy, seen, noises)
        share_ms = (time.perf_counter() - started) * 1e3 / len(attempts)
        for attempt, observation, chunk in zip(attempts, observations, chunks, strict=True):
            attempt.latencies_ms.append(share_ms)
            attempt.states.append(_state_of(observation))
            attempt.planned = self._checked(attempt, chunk)
            attempt.chunks += 1

    def _checked(self, attempt: _Attempt, sampled: Any) -> Actions:
        """The part of a chunk that is carried out."""
        chunk = np.asarray(sampled, dtype=np.float32)
        if chunk.ndim != 2 or len(chunk) < self._execute:
            raise PolicyError(
                f"{attempt.name}: the policy returned a chunk of shape {list(chunk.shape)}, "
                f"expected [at least {self._execute}, action_dim]"
            )
        if not np.isfinite(chunk).all():
            raise NonFiniteError(
                f"{attempt.name}, chunk {attempt.chunks}: the policy returned a non-finite action"
            )
        assert attempt.limits is not None
        low, high = attempt.limits
        if chunk.shape[1] != len(low):
            raise PolicyError(
                f"{attempt.name}: the policy's actions have {chunk.shape[1]} numbers, the "
                f"environment takes {len(low)}"
            )
        return np.clip(chunk[: self._execute], low, high)

    def _record(self, group: _Group, attempt: _Attempt, success: bool) -> EpisodeRecord:
        actions = np.concatenate(attempt.executed)
        return EpisodeRecord(
            task=attempt.task,
            seed=attempt.seed,
            success=success,
            steps=len(actions),
            chunks=attempt.chunks,
            jerk=mean_squared_jerk(actions),
            ms_per_chunk=statistics.median(attempt.latencies_ms),
            states=attempt.states,
            reruns=self._deaths[group.task, group.seeds],
            actions_sha256=hashlib.sha256(actions.tobytes()).hexdigest(),
        )

    def _bury(self, simulator: Simulator) -> None:
        """Forget a dead or silent simulator; its group starts again, before any other."""
        group = self._active[simulator]
        cause = self._pool.discard(simulator)
        for other in group.attempts:
            del self._active[other]
            if other is not simulator:  # it owes an answer that nobody wants any more
                other.kill()
                self._pool.discard(other)
        self._pending[group.task].appendleft(group.seeds)
        self._deaths[group.task, group.seeds] += 1
        if self._deaths[group.task, group.seeds] >= MAX_DEATHS:
            raise EvaluationError(
                f"{group.name}: {MAX_DEATHS} simulator processes died on this episode, the last "
                f"one {cause}; check the memory of the machine and the simulator's own messages"
            )


def _state_of(observation: Observation) -> list[float]:
    return np.asarray(observation.get("state", ()), np.float64).round(5).tolist()


def _account(attempt: _Attempt, reply: Mapping[str, Any]) -> tuple[bool, bool]:
    """Book what the simulator executed; returns (episode over, success)."""
    if attempt.planned is None:
        attempt.limits = (reply["low"], reply["high"])
        return False, False
    steps = reply["steps"]
    attempt.executed.append(attempt.planned[:steps])
    return reply["observation"] is None, reply["success"]


def _simulator_error(attempt: _Attempt, error: Mapping[str, str]) -> OmegaError:
    if error["kind"] == "unavailable":
        return SimulatorUnavailable(error["message"])
    if error["kind"] == "fault":
        return SimulatorError(f"{attempt.name}: {error['message']}")
    return EvaluationError(f"{attempt.name}: the simulator failed: {error['message']}")


def _unchanged(observation: Observation) -> Observation:
    return observation


def blank_images(observation: Observation) -> Observation:
    """A control: every image black, all else as it is."""
    images = {name: np.zeros_like(image) for name, image in observation["images"].items()}
    return {**observation, "images": images}


def replaced_instruction(instructions: Mapping[str, str]) -> Transform:
    """A control: each instruction replaced by another one, as the mapping says.

    ``replaced_instruction(shifted(list))`` is the usual shuffle; see :func:`shifted`.
    """

    def transform(observation: Observation) -> Observation:
        return {**observation, "prompt": instructions[observation["prompt"]]}

    return transform


def shifted(instructions: Sequence[str]) -> dict[str, str]:
    """Each instruction mapped to the next one, the last to the first: none to itself."""
    distinct = list(dict.fromkeys(instructions))
    return dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
