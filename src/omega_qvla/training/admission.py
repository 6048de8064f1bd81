"""Which tasks a policy may be benchmarked on, and the evidence.

A task measures a vision-language-action policy only if the policy solves it *because of* what it
sees and what it is told.  Three paired evaluations over the same unseen seeds decide:

* ``plain``: at least 80 % success;
* ``blank``: black images; and ``shuffled``: the instruction of another task.  The upper end of
  each control's Wilson interval must stay below half of the lower end of the plain one.

A fourth, ``swapped``, is reported and decides nothing: tasks that share a scene are given each
other's instruction, which was never part of the training data's mismatches.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.rollout import (
    Transform,
    blank_images,
    replaced_instruction,
    rollout,
    shifted,
)
from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.results.statistics import wilson_interval

LEAST_SUCCESS = 0.8
EVALUATION_SEED = 0
OBSERVATION_SEED = 2_000_000
EXECUTE = 5
CONTROLS = ("blank", "shuffled")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One task under one condition; what a worker process is given.

    Attributes:
        policy: what ``load_policy`` takes.
        told: the instruction the policy is given instead of the task's own, if any.
        journal: file of finished episodes.
        fingerprint: of the policy's weights; a journal of other weights is refused.
    """

    policy: str
    task: str
    condition: str
    told: str | None
    episodes: int
    journal: str
    fingerprint: str


def measure(
    policy: str,
    tasks: Sequence[str],
    progress: Progress,
    *,
    episodes: int,
    control_episodes: int,
    journals: Path,
    weights: Path,
    workers: int = 2,
) -> dict[str, dict[str, Any]]:
    """Success of every task under each condition, with intervals and the verdict.

    Controls use the first ``control_episodes`` of the same seeds.  Each worker process holds its
    own copy of the policy on one thread, and resumes from its journal.
    """
    shuffled, swapped = _shuffle(tasks), _swaps(tasks)
    fingerprint = hashlib.sha256(weights.read_bytes()).hexdigest()
    journals.mkdir(parents=True, exist_ok=True)

    def job(condition: str, task: str, told: str | None, count: int) -> Job:
        journal = str(journals / f"{condition}.{task}.jsonl")
        return Job(policy, task, condition, told, count, journal, fingerprint)

    jobs = [job("plain", task, None, episodes) for task in tasks]
    jobs += [job("blank", task, None, control_episodes) for task in tasks]
    jobs += [job("shuffled", task, shuffled[task], control_episodes) for task in tasks]
    jobs += [job("swapped", task, other, control_episodes) for task, other in swapped.items()]
    table: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(evaluate, one): one for one in jobs}
        for done, future in enumerate(as_completed(futures), start=1):
            one = futures[future]
            table[one.task][one.condition] = _rate(future.result(), one.episodes)
            if one.told is not None:
                table[one.task][one.condition]["told"] = one.told
            progress("evaluation", done, len(jobs))
    for row, task in zip(table.values(), tasks, strict=True):
        row["grasp"] = TASKS[task].grasp
        row["admitted"] = admitted(row)
    return table


def evaluate(job: Job) -> int:
    """Solved episodes of one job; runs in a worker process."""
    torch.set_num_threads(1)
    transform: Transform | None = None
    if job.condition == "blank":
        transform = blank_images
    elif job.told is not None:
        transform = replaced_instruction({TASKS[job.task].instruction: job.told})
    with SimulatorPool(workers=1) as pool:
        records = rollout(
            load_policy(job.policy),
            [job.task],
            range(EVALUATION_SEED, EVALUATION_SEED + job.episodes),
            pool=pool,
            execute=EXECUTE,
            transform=transform,
            journal=job.journal,
            identity={"condition": job.condition, "told": job.told, "weights": job.fingerprint},
        )
    return sum(record.success for record in records)


def admitted(row: Mapping[str, Any]) -> bool:
    """The rule of this module, on one task's three rates."""
    plain, controls = row["plain"], [row[name] for name in CONTROLS]
    enough = plain["success"][0] >= LEAST_SUCCESS * plain["success"][1]
    return enough and all(c["ci95"][1] < 0.5 * plain["ci95"][0] for c in controls)


def _shuffle(tasks: Sequence[str]) -> dict[str, str]:
    """Each task and the next one's instruction."""
    texts = [TASKS[task].instruction for task in tasks]
    return {task: shifted(texts)[text] for task, text in zip(tasks, texts, strict=True)}


def _swaps(tasks: Sequence[str]) -> dict[str, str]:
    """Each task that shares its scene with another one, and that one's instruction."""
    scenes: dict[str, list[str]] = {}
    for task in tasks:
        scenes.setdefault(TASKS[task].scene, []).append(task)
    pairs = [_shuffle(group) for group in scenes.values() if len(group) > 1]
    return {task: told for group in pairs for task, told in group.items()}


def _rate(solved: int, episodes: int) -> dict[str, Any]:
    low, high = wilson_interval(solved, episodes)
    return {"success": [solved, episodes], "ci95": [round(low, 4), round(high, 4)]}


def held_out_observations(
    policy: NativePolicy, tasks: Sequence[str], *, episodes: int = 3, per_episode: int = 8
) -> Observations:
    """Observations for calibration and for comparison, from whole episodes of the policy.

    Every other episode belongs to the split ``heldout``; its seeds were used neither in training
    nor in evaluation.  Of each episode ``per_episode`` observations are kept, evenly spaced.
    """
    kept: list[dict[str, Any]] = []
    for number, task in enumerate(tasks):
        env = MetaWorldEnv(task)
        for episode in range(2 * episodes):
            seed = OBSERVATION_SEED + 1_000 * number + episode
            seen = _observe_episode(policy, env, seed)
            picks = np.unique(np.linspace(0, len(seen) - 1, per_episode).round().astype(int))
            split = "heldout" if episode % 2 else "calibration"
            kept += [{**seen[i], "task": task, "split": split} for i in picks]
        env.close()
    return Observations(kept)


def _observe_episode(policy: NativePolicy, env: MetaWorldEnv, seed: int) -> list[dict[str, Any]]:
    """Every observation the policy acts on in one episode."""
    observation, seen = env.reset(seed=seed)[0], []
    generator = torch.Generator().manual_seed(seed)
    while len(seen) * EXECUTE < env.max_steps:
        seen.append(observation)
        chunk = policy.sample_actions(observation, generator=generator)
        if any([env.advance(action)[0] for action in chunk[:EXECUTE]]):
            break
        observation = env.observe()
    return seen
