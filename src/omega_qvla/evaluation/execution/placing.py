"""Where a sweep runs: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.execution.evaluate import evaluate_with
from omega_qvla.evaluation.execution.processes import LocalCrew
from omega_qvla.evaluation.execution.ray_cluster import RayCrew
from omega_qvla.evaluation.plan import Evaluate
from omega_qvla.evaluation.sweep import evaluate_here
from omega_qvla.policies.full_precision import available_memory
from omega_qvla.threads import available_cores

WORTH_PROCESSES = 200
"""Below so many episodes in all, starting worker processes costs more than it brings."""
_COPIES, _PROCESS_BYTES, _SIMULATOR_BYTES = 3, 1 << 30, 1 << 28
"""A process needs the policy, a copy with outliers, what quantizing makes, libraries."""


@dataclass(frozen=True)
class Placement:
    """Where to run.

    Attributes:
        evaluate: for :func:`sweep.run_sweep`.
        notice: a line for the user, or empty.
    """

    evaluate: Evaluate
    notice: str = ""


def place(
    *,
    ray: str | None,
    processes: int | None,
    threads: int,
    episodes: int,
    policy_bytes: int,
    simulators: int = 1,
) -> Placement:
    """Choose where a sweep runs.

    Args:
        ray: address of a cluster, see :class:`RayCrew`; None: this machine, without Ray.
        processes: worker processes of this machine, each with a policy and simulators; 1 is this
            process with its shared simulators; None: as many as cores and memory allow, if there
            are enough ``episodes`` (of all rows) to make it worth while.
        threads: of each policy.
        policy_bytes: the policy in full precision, in memory.
        simulators: of each process.

    Raises:
        ResourceError: both were asked for, or the cluster cannot be used.
    """
    if ray is not None:
        if processes is not None:
            raise ResourceError("--ray places the work itself; leave --processes out")
        crew = RayCrew(ray, cpus=threads)
        return Placement(evaluate_with(crew, threads=threads), crew.description)
    if processes is None:
        each = _COPIES * policy_bytes + _PROCESS_BYTES + simulators * _SIMULATOR_BYTES
        affordable = available_memory() // each
        processes = min(available_cores() // threads, affordable)
        if episodes < WORTH_PROCESSES:
            processes = 1
    if processes <= 1:
        return Placement(evaluate_here)
    notice = f"{processes} processes, each with the policy and its simulators"
    return Placement(evaluate_with(LocalCrew(processes), threads=threads), notice)
