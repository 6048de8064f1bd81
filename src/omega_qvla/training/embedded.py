"""How the embedded policies are made, from nothing, on two CPU cores.

1. demonstrations of scripted experts (``demonstrations.py``), about 10 minutes;
2. flow-matching imitation (``train.py``) to a third of its steps;
3. corrections: the half-trained policy acts, the expert labels (``correction.py``), 2 minutes;
4. the rest of the training, 50 minutes in all;
5. evaluation with controls, which decides what is admitted (``admission.py``), 20 minutes;
6. observations for calibration and comparison, and the provenance of all of it.

Every part is skipped if its result is there, and training continues from its last checkpoint, so
an interrupted run is simply started again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omega_qvla.calibration.observations import FILE as OBSERVATIONS
from omega_qvla.checkpoints.stored_tensors import WEIGHTS
from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.paligemma.openpi import CONFIG
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.training.admission import (
    EVALUATION_SEED,
    EXECUTE,
    OBSERVATION_SEED,
    held_out_observations,
    measure,
)
from omega_qvla.training.correction import CORRECTION_SEED, collect_corrections
from omega_qvla.training.demonstrations import TRAINING_SEED, CollectionPlan, collect_all
from omega_qvla.training.families import FAMILIES
from omega_qvla.training.run import MISMATCH, SHARES, train_policy
from omega_qvla.training.train import TrainingPlan

COLLECTION = CollectionPlan()


@dataclass(frozen=True)
class EmbeddedPolicy:
    """The recipe of one embedded policy.

    Attributes:
        family: key of ``FAMILIES``.
        tasks: what it is taught, in an order in which no task is followed by one of its own scene
            (see ``rollout.shifted``).
        plan: of the whole training.
        correction_step: when the policy is left to act and is corrected.
        corrections: episodes per task.
    """

    family: str
    tasks: tuple[str, ...]
    plan: TrainingPlan
    correction_step: int
    corrections: Mapping[str, int]


EMBEDDED: Mapping[str, EmbeddedPolicy] = {
    "tiny-pi05": EmbeddedPolicy(
        family=Pi05Policy.family,
        tasks=(
            "drawer-open-v3",
            "door-open-v3",
            "faucet-open-v3",
            "push-v3",
            "faucet-close-v3",
            "pick-place-v3",
        ),
        plan=TrainingPlan(steps=3500),
        correction_step=1235,
        corrections={
            "pick-place-v3": 60,
            "push-v3": 45,
            "drawer-open-v3": 25,
            "door-open-v3": 25,
            "faucet-open-v3": 20,
            "faucet-close-v3": 20,
        },
    ),
    # The tasks that tiny-pi05 was admitted on.
    "tiny-gr00t": EmbeddedPolicy(
        family=Gr00tN15Policy.family,
        tasks=("drawer-open-v3", "faucet-open-v3", "door-open-v3", "faucet-close-v3"),
        plan=TrainingPlan(steps=3000),
        correction_step=1000,
        corrections={
            "drawer-open-v3": 25,
            "door-open-v3": 25,
            "faucet-open-v3": 20,
            "faucet-close-v3": 20,
        },
    ),
}

EVALUATION_EPISODES, CONTROL_EPISODES = 100, 30
PROVENANCE = "provenance.json"

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, of how much)."""


def rebuild(
    name: str,
    out: Path,
    *,
    steps: int | None = None,
    workers: int = 2,
    progress: Progress,
    tasks: Sequence[str] | None = None,
    episodes: int = EVALUATION_EPISODES,
) -> dict[str, Any]:
    """Make a policy in ``out``; returns its provenance, which is written there too.

    Args:
        name: of the policy, a key of ``EMBEDDED``.
        out: the policy directory; demonstrations and checkpoints are kept in it too.
        steps: optimizer steps if not the recipe's own.
        workers: simulator processes.
        tasks: what it is taught if not the recipe's own.
        episodes: per task of the evaluation.
    """
    recipe = EMBEDDED[name]
    tasks = recipe.tasks if tasks is None else tuple(tasks)
    plan = recipe.plan if steps is None else replace(recipe.plan, steps=steps)
    correction_step = plan.steps * recipe.correction_step // recipe.plan.steps
    demos, minutes, summary = out / "demonstrations", Minutes(), []
    with minutes.of("collection"):
        for count in collect_all(tasks, COLLECTION, demos, workers):
            summary.append(count)
            progress("demonstrations", len(summary), len(tasks))
    with minutes.of("training"):
        _train(recipe, plan, demos, tasks, out, progress, until=correction_step)
    with minutes.of("correction"):
        for count in _correct_all(out, demos, tasks, recipe.corrections, workers):
            summary.append(count)
            progress("corrections", len(summary) - len(tasks), len(tasks))
    with minutes.of("training"):
        _train(recipe, plan, demos, tasks, out, progress)
    policy = load_policy(out)
    with minutes.of("evaluation"):
        results = measure(
            str(out),
            tasks,
            progress,
            episodes=episodes,
            control_episodes=min(CONTROL_EPISODES, episodes),
            journals=out / "run",
            weights=out / WEIGHTS,
            workers=workers,
        )
    useful = [task for task in tasks if results[task]["admitted"]] or tasks
    held_out_observations(policy, useful).save_npz(out / OBSERVATIONS)
    provenance = describe(name, out, plan, tasks, results, summary, minutes.spent)
    (out / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n")
    return provenance


def describe(
    name: str,
    directory: Path,
    plan: TrainingPlan,
    tasks: Sequence[str],
    results: Mapping[str, Any],
    demonstrations: Sequence[Mapping[str, Any]],
    minutes: Mapping[str, float],
) -> dict[str, Any]:
    """Everything someone needs to judge or repeat the policy."""
    curve = json.loads((directory / "run" / "curve.json").read_text())["curve"]
    return {
        "policy": name,
        "command": f"omega-qvla train {name} --out DIR",
        "machine": f"{os.cpu_count()} {platform.machine()} processor cores, no GPU",
        "minutes": {part: round(value, 1) for part, value in minutes.items()},
        "tasks": {task: TASKS[task].instruction for task in tasks},
        "admitted": [task for task in tasks if results[task]["admitted"]],
        "results": dict(results),
        "evaluation": {
            "episodes": results[tasks[0]]["plain"]["success"][1],
            "control_episodes": results[tasks[0]]["blank"]["success"][1],
            "actions_executed_per_chunk": EXECUTE,
            "denoising_steps": load_policy(directory).config.steps,
            "intervals": "Wilson 95 %",
        },
        "seeds": {
            "demonstrations": TRAINING_SEED,
            "corrections": CORRECTION_SEED,
            "evaluation": EVALUATION_SEED,
            "observations": OBSERVATION_SEED,
            "training": plan.seed,
        },
        "demonstrations": list(demonstrations),
        "collection": asdict(COLLECTION),
        "training": asdict(plan) | {"correction_step": EMBEDDED[name].correction_step},
        "shares": SHARES,
        "mismatched_instructions": {
            "share": MISMATCH,
            "what": (
                "this share of the training samples carries the instruction of a task with "
                "another scene and the label 'hold still'; tasks of one scene are never paired "
                "so. The shuffled control therefore measures what was trained for; the swapped "
                "control, between tasks of one scene, was not"
            ),
        },
        "curve": curve,
    }


class Minutes:
    """Wall-clock minutes per part of the work."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def of(self, part: str) -> _Stopwatch:
        """Time a block; parts of the same name are added up."""
        return _Stopwatch(self.spent, part)


class _Stopwatch:
    def __init__(self, spent: dict[str, float], part: str) -> None:
        self._spent, self._part = spent, part

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        elapsed = (time.monotonic() - self._started) / 60.0
        self._spent[self._part] = self._spent.get(self._part, 0.0) + elapsed


def _train(
    recipe: EmbeddedPolicy,
    plan: TrainingPlan,
    demos: Path,
    tasks: Sequence[str],
    directory: Path,
    progress: Progress,
    until: int | None = None,
) -> None:
    started = all((directory / name).is_file() for name in (CONFIG, WEIGHTS))
    train_policy(
        FAMILIES[recipe.family],
        demos,
        tasks,
        plan,
        directory,
        lambda point: progress("training", int(point["step"]), plan.steps),
        processor=load_policy(directory).processor if started else None,
        until=until,
    )


def _correct_all(
    directory: Path,
    demos: Path,
    tasks: Sequence[str],
    episodes: Mapping[str, int],
    workers: int,
) -> Iterator[dict[str, Any]]:
    """Corrections of every task that has none yet; yields summaries."""
    jobs = [(str(directory), task, episodes[task], str(demos / f"{task}.1.npz")) for task in tasks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(_correct, job) for job in jobs if not Path(job[3]).is_file()]
        for future in as_completed(futures):
            yield future.result()


def _correct(job: tuple[str, str, int, str]) -> dict[str, Any]:
    directory, task, episodes, path = job
    torch.set_num_threads(1)
    corrections = collect_corrections(load_policy(directory), task, episodes)
    corrections.save(Path(path))
    return {"task": task, "correction_episodes": episodes, "samples": len(corrections)}
