"""Closed-loop evaluation with paired seeds.

An episode is a (task, seed).  The policy is asked for a chunk of actions, the first ``execute`` of
them are carried out, then it is asked again with the new observation, until the simulator reports
success or the task's steps are used up.  Everything random is a function of the episode: the
simulator is reset with ``seed``, and chunk k starts from noise drawn by a generator seeded with
(seed, k).  Two methods evaluated on the same episodes are therefore *paired*.

Physics and rendering run in simulator processes; the policy stays here and answers one observation
at a time.  One policy object serves all simulators, whatever its type or device, and the result
does not depend on how many there are.

A simulator that dies or falls silent is replaced and its episode starts again with its seed; what
the interrupted attempt did is forgotten, so no episode is lost or counted twice.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import NonFiniteError, OmegaError, PolicyError, SimulatorUnavailable
from omega_qvla.evaluation.channel import ChannelError
from omega_qvla.evaluation.child import wait_for_replies
from omega_qvla.evaluation.episodes import EpisodeJournal, EpisodeRecord
from omega_qvla.evaluation.openloop import Sampler, shape_of_noise
from omega_qvla.evaluation.simulators import Simulator, SimulatorPool
from omega_qvla.evaluation.statistics import mean_squared_jerk

Actions = npt.NDArray[np.float32]
Observation = dict[str, Any]
Transform = Callable[[Observation], Observation]
Progress = Callable[[int, int], None]

ACTION_LIMITS = (-1.0, 1.0)
"""Executed actions are clipped to these limits, the simulators' own."""
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
    planned: Actions | None = None
    executed: list[Actions] = field(default_factory=list[Actions])
    latencies_ms: list[float] = field(default_factory=list[float])

    @property
    def name(self) -> str:
        return f"{self.task}, seed {self.seed}"


def rollout(
    policy: Sampler,
    tasks: Sequence[str],
    seeds: Iterable[int],
    *,
    pool: SimulatorPool,
    execute: int = 5,
    transform: Transform | None = None,
    journal: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    keep: Callable[[EpisodeRecord], None] | None = None,
) -> list[EpisodeRecord]:
    """Run every task with every seed.

    Args:
        policy: answers ``sample_actions(observation, noise=[horizon, action_dim])``.
        tasks: task names the pool's environment knows.
        seeds: non-negative integers; repeated ones count once.
        pool: the simulators; still usable afterwards, also after an error.
        execute: actions carried out of each chunk before the policy is asked again.
        transform: changes each observation before the policy sees it, for controls such as
            :func:`blank_images`.
        journal: file of finished episodes; those it holds already are not run again.
        identity: JSON values describing policy and transform, kept in the journal; resuming with
            others is refused.
        progress: called with (finished, total), first with what the journal held.
        keep: called with each record as its episode ends, where something else keeps the journal.

    Returns:
        One record per episode, ordered by task, then seed, as given.

    Raises:
        SimulatorUnavailable: the simulator cannot be started; names what to install.
        EvaluationError: the simulator failed, or died ``MAX_DEATHS`` times on one episode.
        PolicyError: chunks are shorter than ``execute`` or of the wrong shape.
        NonFiniteError: the policy returned NaN or Inf.
        ResumeError: the journal belongs to another evaluation.
    """
    distinct = list(dict.fromkeys(seeds))
    episodes = [(task, seed) for task in dict.fromkeys(tasks) for seed in distinct]
    run = _Run(policy, pool, execute, transform)
    settings = journal_settings(pool, execute, identity)
    if journal is None:
        finished = run.finish(episodes, {}, keep or (lambda record: None), progress)
    else:
        with EpisodeJournal(journal, settings) as book:
            finished = run.finish(episodes, dict(book.records), book.append, progress)
    return [finished[episode] for episode in episodes]


def journal_settings(
    pool: SimulatorPool, execute: int, identity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a journal's first line says: everything that fixes the outcome of an episode."""
    return {
        "environment": pool.environment,
        "options": pool.options,
        "execute": execute,
        "identity": dict(identity or {}),
    }


class _Run:
    """The scheduler: which simulator runs which episode, and what happens to each reply."""

    def __init__(
        self, policy: Sampler, pool: SimulatorPool, execute: int, transform: Transform | None
    ) -> None:
        self._noise_shape = shape_of_noise(policy)
        horizon = self._noise_shape[0]
        if not 1 <= execute <= horizon:
            raise PolicyError(
                f"cannot execute {execute} actions of chunks with a horizon of {horizon}"
            )
        self._policy = policy
        self._pool = pool
        self._execute = execute
        self._transform: Transform = transform or _unchanged
        self._pending: dict[str, deque[int]] = {}
        self._active: dict[Simulator, _Attempt] = {}
        self._deaths: Counter[tuple[str, int]] = Counter()

    def finish(
        self,
        episodes: Sequence[tuple[str, int]],
        finished: dict[tuple[str, int], EpisodeRecord],
        keep: Callable[[EpisodeRecord], None],
        progress: Progress | None,
    ) -> dict[tuple[str, int], EpisodeRecord]:
        """Run what is not finished yet; any error, Ctrl-C included, stops the simulators."""
        for task, seed in episodes:
            if (task, seed) not in finished:
                self._pending.setdefault(task, deque()).append(seed)
        report = progress or _silent
        total = len(episodes)
        done = total - sum(map(len, self._pending.values()))
        report(done, total)
        try:
            while self._active or any(self._pending.values()):
                for record in self._advance():
                    keep(record)
                    finished[record.key] = record
                    done += 1
                    report(done, total)
        except BaseException:
            self._pool.kill()
            raise
        return finished

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
        waiting = sum(map(len, self._pending.values()))
        for simulator in self._pool.idle(self._active, len(self._active) + waiting):
            task = self._choose_task(simulator.task)
            if task is None:
                return
            attempt = _Attempt(task, self._pending[task].popleft())
            self._active[simulator] = attempt
            try:
                self._pool.start(simulator, attempt.task, attempt.seed)
            except ChannelError:
                self._bury(simulator)

    def _choose_task(self, current: str | None) -> str | None:
        """The simulator's present task if it has episodes left, else the least served one."""
        if current is not None and self._pending.get(current):
            return current
        served = Counter(attempt.task for attempt in self._active.values())
        open_tasks = [task for task, seeds in self._pending.items() if seeds]
        if not open_tasks:
            return None
        return max(open_tasks, key=lambda task: len(self._pending[task]) / (1 + served[task]))

    def _hear(self, simulator: Simulator) -> EpisodeRecord | None:
        """Handle one reply; returns a record if it ended the episode."""
        attempt = self._active[simulator]
        try:
            reply = simulator.channel.receive()
            if "error" in reply:
                raise _simulator_error(attempt, reply["error"])
            over, success = _account(attempt, reply)
            if over:
                del self._active[simulator]
                return self._record(attempt, success)
            actions = self._plan(attempt, reply["observation"])
            simulator.request({"actions": actions})
        except ChannelError:
            self._bury(simulator)
        return None

    def _plan(self, attempt: _Attempt, observation: Observation) -> Actions:
        """Ask the policy for the next chunk; the noise depends on (seed, chunk) alone."""
        generator = np.random.default_rng((attempt.seed, attempt.chunks))
        noise = generator.standard_normal(self._noise_shape, dtype=np.float32)
        seen = self._transform(observation)
        started = time.perf_counter()
        chunk = np.asarray(self._policy.sample_actions(seen, noise=noise), dtype=np.float32)
        attempt.latencies_ms.append((time.perf_counter() - started) * 1e3)
        if chunk.ndim != 2 or len(chunk) < self._execute:
            raise PolicyError(
                f"{attempt.name}: the policy returned a chunk of shape {list(chunk.shape)}, "
                f"expected [at least {self._execute}, action_dim]"
            )
        if not np.isfinite(chunk).all():
            raise NonFiniteError(
                f"{attempt.name}, chunk {attempt.chunks}: the policy returned a non-finite action"
            )
        attempt.planned = np.clip(chunk[: self._execute], *ACTION_LIMITS)
        attempt.chunks += 1
        return attempt.planned

    def _record(self, attempt: _Attempt, success: bool) -> EpisodeRecord:
        actions = np.concatenate(attempt.executed)
        return EpisodeRecord(
            task=attempt.task,
            seed=attempt.seed,
            success=success,
            steps=len(actions),
            chunks=attempt.chunks,
            jerk=mean_squared_jerk(actions),
            ms_per_chunk=statistics.median(attempt.latencies_ms),
            reruns=self._deaths[attempt.task, attempt.seed],
        )

    def _bury(self, simulator: Simulator) -> None:
        """Forget a dead or silent simulator and put its episode back at the front."""
        attempt = self._active.pop(simulator)
        cause = self._pool.discard(simulator)
        self._pending[attempt.task].appendleft(attempt.seed)
        self._deaths[attempt.task, attempt.seed] += 1
        if self._deaths[attempt.task, attempt.seed] >= MAX_DEATHS:
            raise EvaluationError(
                f"{attempt.name}: {MAX_DEATHS} simulator processes died on this episode, the last "
                f"one {cause}; check the memory of the machine and the simulator's own messages"
            )


def _account(attempt: _Attempt, reply: Mapping[str, Any]) -> tuple[bool, bool]:
    """Book what the simulator executed; returns (episode over, success)."""
    if attempt.planned is None:
        return False, False
    steps = reply["steps"]
    attempt.executed.append(attempt.planned[:steps])
    return reply["observation"] is None, reply["success"]


def _simulator_error(attempt: _Attempt, error: Mapping[str, str]) -> OmegaError:
    if error["kind"] == "unavailable":
        return SimulatorUnavailable(error["message"])
    return EvaluationError(f"{attempt.name}: the simulator failed: {error['message']}")


def _unchanged(observation: Observation) -> Observation:
    return observation


def _silent(done: int, total: int) -> None:
    del done, total


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
