"""LIBERO's suites and sizes, known without the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from omega_qvla.errors import PolicyError, did_you_mean

FACTORY = "omega_qvla.evaluation.simulators.libero:LiberoEnv"
SUITES = {
    "spatial": "libero_spatial",
    "object": "libero_object",
    "goal": "libero_goal",
    "long": "libero_10",
}
"""The paper's names of the suites and LIBERO's."""
TASKS_PER_SUITE, INITIAL_STATES = 10, 50
PROTOCOLS = {"paper": 10, "full": INITIAL_STATES}
"""Trials per task; each starts from the recorded initial state of its number."""

IMAGE_SIZE, ACTION_DIM, STATE_DIM = 256, 7, 8
SETTLING_STEPS, SIMULATOR_STEPS = 10, 1000
VIEWS = ("agentview_image", "robot0_eye_in_hand_image")
"""LIBERO's names of the fixed and the wrist view, in the order of the policies' cameras."""


Gripper = Literal["signed", "opening"]


def suite_tasks(suites: str) -> list[str]:
    """Task names ``suite:number`` of one suite, several (with commas) or ``all``.

    Raises:
        PolicyError: there is no such suite.
    """
    names = list(SUITES) if suites == "all" else [name.strip() for name in suites.split(",")]
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise PolicyError(
            f"LIBERO has no suite {', '.join(map(repr, unknown))}: give {', '.join(SUITES)} or all"
            f"{did_you_mean(unknown[0], SUITES)}"
        )
    return [f"{name}:{index}" for name in names for index in range(TASKS_PER_SUITE)]


def chosen_tasks(names: Sequence[str] | None) -> list[str]:
    """The tasks that a user named; empty if none were.

    Raises:
        PolicyError: LIBERO has no such task.
    """
    known = suite_tasks("all")
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise PolicyError(
            f"LIBERO has no task {', '.join(map(repr, unknown))}: tasks are SUITE:NUMBER, from "
            f"{known[0]} to {known[-1]}"
        )
    return list(names or ())


def per_suite(success: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """[successes, episodes] of each suite, from those of its tasks."""
    suites: dict[str, list[int]] = {}
    for task, (solved, episodes) in success.items():
        count = suites.setdefault(task.partition(":")[0], [0, 0])
        count[0] += solved
        count[1] += episodes
    return suites
