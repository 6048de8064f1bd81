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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.evaluation.metaworld import TASKS, MetaWorldEnv
from omega_qvla.evaluation.rollout import (
    Transform,
    blank_images,
    replaced_instruction,
    rollout,
    shifted,
)
from omega_qvla.evaluation.simulators import SimulatorPool
from omega_qvla.evaluation.statistics import wilson_interval
from omega_qvla.policies.pi05_policy import Pi05Policy

LEAST_SUCCESS = 0.8
EVALUATION_SEED = 0
OBSERVATION_SEED = 2_000_000
EXECUTE = 5

Progress = Callable[[str, int, int], None]


def measure(
    policy: Pi05Policy,
    tasks: Sequence[str],
    episodes: int,
    progress: Progress,
    *,
    journal: Path | None = None,
    workers: int = 2,
) -> dict[str, dict[str, Any]]:
    """Success of every task under the three conditions, with intervals and the verdict."""
    instructions = [TASKS[task].instruction for task in tasks]
    everywhere = shifted(instructions)
    swaps = _swaps(tasks)
    conditions: dict[str, tuple[Sequence[str], Transform | None]] = {
        "plain": (tasks, None),
        "blank": (tasks, blank_images),
        "shuffled": (tasks, replaced_instruction(everywhere)),
        "swapped": (
            list(swaps),
            replaced_instruction(
                {TASKS[task].instruction: TASKS[other].instruction for task, other in swaps.items()}
            ),
        ),
    }
    table: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    seeds = range(EVALUATION_SEED, EVALUATION_SEED + episodes)
    with SimulatorPool(workers) as pool:
        for condition, (measured, transform) in conditions.items():
            records = rollout(
                policy,
                measured,
                seeds,
                pool=pool,
                execute=EXECUTE,
                transform=transform,
                journal=journal and journal / f"{condition}.jsonl",
                identity={"condition": condition},
                progress=lambda done, total, name=condition: progress(name, done, total),
            )
            for task in measured:
                solved = sum(record.success for record in records if record.task == task)
                table[task][condition] = _rate(solved, episodes)
    for task in tasks:
        table[task]["told_in_shuffled"] = everywhere[TASKS[task].instruction]
        table[task]["grasp"] = TASKS[task].grasp
        table[task]["admitted"] = admitted(table[task])
    return table


def _swaps(tasks: Sequence[str]) -> dict[str, str]:
    """Each task that shares its scene with another one, and that one."""
    scenes: dict[str, list[str]] = {}
    for task in tasks:
        scenes.setdefault(TASKS[task].scene or task, []).append(task)
    return {t: shifted(group)[t] for group in scenes.values() if len(group) > 1 for t in group}


def admitted(row: dict[str, Any]) -> bool:
    """The rule of this module, on one task's three rates."""
    plain, controls = row["plain"], (row["blank"], row["shuffled"])
    enough = plain["success"][0] >= LEAST_SUCCESS * plain["success"][1]
    return enough and all(c["ci95"][1] < 0.5 * plain["ci95"][0] for c in controls)


def _rate(solved: int, episodes: int) -> dict[str, Any]:
    low, high = wilson_interval(solved, episodes)
    return {"success": [solved, episodes], "ci95": [round(low, 4), round(high, 4)]}


def held_out_observations(
    policy: Pi05Policy, tasks: Sequence[str], *, episodes: int = 3, per_episode: int = 8
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


def _observe_episode(policy: Pi05Policy, env: MetaWorldEnv, seed: int) -> list[dict[str, Any]]:
    """Every observation the policy acts on in one episode."""
    observation, seen = env.reset(seed), []
    generator = torch.Generator().manual_seed(seed)
    while len(seen) * EXECUTE < env.max_steps:
        seen.append(observation)
        chunk = policy.sample_actions(observation, generator=generator)
        if any([env.step(action) for action in chunk[:EXECUTE]]):
            break
        observation = env.observe()
    return seen
