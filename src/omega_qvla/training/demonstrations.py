"""Demonstrations from Meta-World's scripted experts, for imitation learning.

An expert is a function of the simulator's full state.  Every kept sample is an observation, as the
policy will see it, and the *chunk the expert would execute from there*: the simulator's state is
saved, the expert acts for ``horizon`` steps, and the state is put back.  Labels are therefore right
in every state, also where another behaviour led (Ross et al., DAgger, 2011).

Behaviours visited, by episode number modulo 4:

* 0: the expert itself;
* 1: the expert plus temporally correlated action noise that comes and goes;
* 2: the same with half the noise;
* 3: the expert with rare bursts: a few steps of one random direction.

Auxiliary targets (object and goal positions) come from the simulator's state; they shape the
backbone in training and are never given to the policy.
"""

from __future__ import annotations

import importlib
import multiprocessing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
from omega_qvla.evaluation.simulators.metaworld_tasks import ACTION_DIM
from omega_qvla.files import new_file

Array = npt.NDArray[Any]
Behaviour = Callable[[MetaWorldEnv, Array], Array]
"""(environment, the expert's action) → the action that is executed."""

HORIZON = 10
CAMERAS = ("base", "wrist")
STEPS_AFTER_SUCCESS = 5
TRAINING_SEED = 1_000_000
"""First seed of the demonstrations; evaluation seeds are small numbers and never reach it."""


@dataclass(frozen=True)
class CollectionPlan:
    """How one task's demonstrations are collected.

    Attributes:
        episodes: attempted episodes; those the expert fails are dropped.
        every: control steps between two kept observations.
        noise: standard deviation of the action noise, in action units (1 = 1 cm a step).
    """

    episodes: int = 240
    every: int = 3
    noise: float = 0.4
    seed: int = TRAINING_SEED


@dataclass
class Demonstrations:
    """Samples of one task; arrays of equal length N.

    images: camera → uint8 [N, H, W, 3]; state float32 [N, 4]; actions float32 [N, horizon, 4];
    positions float32 [N, 6] object and goal in metres; episode int32 [N].
    """

    task: str
    images: dict[str, Array]
    state: Array
    actions: Array
    positions: Array
    episode: Array

    def __len__(self) -> int:
        return len(self.state)

    def save(self, path: Path) -> None:
        """Write one uncompressed npz, atomically."""
        arrays = {f"images/{name}": value for name, value in self.images.items()}
        fields = ("state", "actions", "positions", "episode")
        arrays |= {name: getattr(self, name) for name in fields}
        with new_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.ascontiguousarray(array))

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Read what ``save`` wrote; the task is the file's name."""
        with np.load(path, allow_pickle=False) as file:
            images = {name: file[f"images/{name}"] for name in CAMERAS}
            rest = {k: file[k] for k in ("state", "actions", "positions", "episode")}
        return cls(task=path.name.split(".")[0], images=images, **rest)


@dataclass
class Samples:
    """What one episode contributes."""

    images: dict[str, list[Array]] = field(default_factory=lambda: {c: [] for c in CAMERAS})
    state: list[Array] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)
    positions: list[Array] = field(default_factory=list)

    def add(self, env: MetaWorldEnv, chunk: Array) -> None:
        observation, raw = env.observe(), env.raw_observation
        for camera in CAMERAS:
            self.images[camera].append(observation["images"][camera])
        self.state.append(observation["state"])
        self.actions.append(chunk)
        self.positions.append(np.concatenate((raw[4:7], raw[-3:])).astype(np.float32))


def expert_for(task: str) -> Any:
    """Meta-World's scripted expert of ``task``; stateless."""
    return importlib.import_module("metaworld.policies").ENV_POLICY_MAP[task]()


def expert_action(expert: Any, env: MetaWorldEnv) -> Array:
    """The expert's action in the present state, float32 [4] in [-1, 1]."""
    action = np.asarray(expert.get_action(env.raw_observation), dtype=np.float32)
    return np.clip(action, -1.0, 1.0)


def expert_chunk(expert: Any, env: MetaWorldEnv, horizon: int = HORIZON) -> Array:
    """What the expert would execute from here, [horizon, 4]; leaves the simulator as it was."""
    chunk = np.empty((horizon, ACTION_DIM), dtype=np.float32)
    with env.undo():
        for index in range(horizon):
            chunk[index] = expert_action(expert, env)
            env.advance(chunk[index])
    return chunk


def noisy_expert(scale: float, generator: np.random.Generator) -> Behaviour:
    """The expert plus an autoregressive disturbance that comes and goes.

    It is switched on or off with probability 0.06 a step, so that the expert also gets to finish.
    """
    drift, active = np.zeros(3, dtype=np.float32), [True]

    def act(env: MetaWorldEnv, expert: Array) -> Array:
        if generator.random() < 0.06:
            active[0] = not active[0]
        drift[:] = 0.7 * drift + 0.7 * scale * generator.normal(size=3)
        return _disturb(expert, drift) if active[0] else expert

    return act


def bursts(probability: float, generator: np.random.Generator) -> Behaviour:
    """The expert, interrupted now and then by six steps of one random direction."""
    push, left = np.zeros(3, dtype=np.float32), [0]

    def act(env: MetaWorldEnv, expert: Array) -> Array:
        if left[0] == 0 and generator.random() < probability:
            push[:], left[0] = 1.2 * generator.normal(size=3), 6
        if left[0] == 0:
            return expert
        left[0] -= 1
        return _disturb(expert, push)

    return act


def _disturb(action: Array, offset: Array) -> Array:
    moved = action.copy()
    moved[:3] = np.clip(moved[:3] + offset, -1.0, 1.0)
    return moved


def _behaviour(episode: int, noise: float, generator: np.random.Generator) -> Behaviour:
    match episode % 4:
        case 1:
            return noisy_expert(noise, generator)
        case 2:
            return noisy_expert(0.5 * noise, generator)
        case 3:
            return bursts(0.06, generator)
        case _:
            return lambda env, expert: expert


def record_episode(
    env: MetaWorldEnv,
    expert: Any,
    behaviour: Behaviour,
    every: int,
    phase: int,
    *,
    max_steps: int | None = None,
    needs_success: bool = True,
) -> Samples | None:
    """One episode from the present state; None if it fails and only successes are wanted.

    ``phase`` shifts which steps are kept, so that all of them are seen over many episodes.
    """
    samples, solved = Samples(), 0
    for step in range(max_steps or env.max_steps):
        if step % every == phase % every:
            samples.add(env, expert_chunk(expert, env))
        solved += env.advance(behaviour(env, expert_action(expert, env)))[0]
        if solved > STEPS_AFTER_SUCCESS:
            break
    return samples if solved or not needs_success else None


def collect(
    task: str, plan: CollectionPlan, progress: Callable[[int, int], None] | None = None
) -> Demonstrations:
    """All demonstrations of one task; a function of ``task`` and ``plan`` alone."""
    env, expert = MetaWorldEnv(task), expert_for(task)
    kept: list[tuple[int, Samples]] = []
    for episode in range(plan.episodes):
        generator = np.random.default_rng((plan.seed, episode))
        env.reset(seed=plan.seed + episode)
        behaviour = _behaviour(episode, plan.noise, generator)
        samples = record_episode(env, expert, behaviour, plan.every, episode)
        if samples is not None:
            kept.append((episode, samples))
        if progress is not None:
            progress(episode + 1, len(kept))
    env.close()
    return stack(task, kept)


def stack(task: str, kept: list[tuple[int, Samples]]) -> Demonstrations:
    """Episodes → arrays."""

    def join(values: Iterator[list[Array]]) -> Array:
        return np.stack([item for group in values for item in group])

    return Demonstrations(
        task=task,
        images={c: join(s.images[c] for _, s in kept) for c in CAMERAS},
        state=join(s.state for _, s in kept),
        actions=join(s.actions for _, s in kept),
        positions=join(s.positions for _, s in kept),
        episode=np.concatenate([np.full(len(s.state), e, np.int32) for e, s in kept]),
    )


def collect_task(job: tuple[str, CollectionPlan, str]) -> dict[str, Any]:
    """Collect one task into ``directory`` unless it is there already; a worker's entry point."""
    task, plan, directory = job
    path = Path(directory) / f"{task}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        demonstrations = collect(task, plan)
        demonstrations.save(path)
    else:
        demonstrations = Demonstrations.load(path)
    kept = len(np.unique(demonstrations.episode))
    count = {"episodes": kept, "attempted": plan.episodes, "samples": len(demonstrations)}
    return {"task": task, **count}


def collect_all(
    tasks: Sequence[str], plan: CollectionPlan, directory: Path, workers: int = 2
) -> Iterator[dict[str, Any]]:
    """Collect every task, ``workers`` at a time; yields one summary as each is finished."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(collect_task, (task, plan, str(directory))) for task in tasks]
        for job in as_completed(jobs):
            yield job.result()
