"""Where rows are evaluated: in this process, in several of this machine, or on a Ray cluster."""

from __future__ import annotations

from omega_qvla.errors import ResourceError
from omega_qvla.evaluation.execution.executor import Executor
from omega_qvla.evaluation.execution.inline import InlineExecutor
from omega_qvla.evaluation.execution.processes import ProcessExecutor
from omega_qvla.evaluation.execution.ray_cluster import RayExecutor
from omega_qvla.policies.full_precision import available_memory
from omega_qvla.threads import available_cores

WORTH_PROCESSES = 200
"""Below so many episodes in all, starting worker processes costs more than it brings."""
_COPIES, _PROCESS_BYTES, _SIMULATOR_BYTES = 3, 1 << 30, 1 << 28
"""A process needs the policy, a copy with outliers, what quantizing makes; libraries; simulators.
"""


def place(
    *,
    ray: str | None,
    processes: int | None,
    threads: int,
    episodes: int,
    policy_bytes: int,
    simulators: int = 1,
) -> Executor:
    """Choose who evaluates the rows.

    Args:
        ray: address of a cluster, see :class:`RayExecutor`; None: this machine, without Ray.
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
            raise ResourceError("`ray` places the work itself; leave `processes` out")
        return RayExecutor(ray, threads=threads)
    if processes is None:
        each = _COPIES * policy_bytes + _PROCESS_BYTES + simulators * _SIMULATOR_BYTES
        affordable = available_memory() // each
        processes = min(available_cores() // threads, affordable)
        if episodes < WORTH_PROCESSES:
            processes = 1
    return InlineExecutor() if processes <= 1 else ProcessExecutor(processes, threads=threads)
