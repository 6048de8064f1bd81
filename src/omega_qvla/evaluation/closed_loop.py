"""Rows in the embedded simulator, Meta-World, or open loop alone where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from omega_qvla.errors import MissingPackageError, SimulatorUnavailable
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.execution.evaluate import Progress
from omega_qvla.evaluation.execution.executor import Executor
from omega_qvla.evaluation.execution.placing import place
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, SweepRow
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.subjects import Say
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.extras import require
from omega_qvla.results.rows import Comparison
from omega_qvla.threads import chosen_threads

TOGETHER = 8
"""Episodes of Meta-World that advance together."""


@dataclass(frozen=True)
class Resources:
    """Where policies compute.

    Attributes:
        threads: of each policy; None: every core, one where its layers are small, and one of each
            worker of a Ray cluster.
        processes: worker processes of this machine, each with the policy and simulators; 1 is this
            process; None: as many as cores and memory allow, if there are enough episodes.
        ray: address of a Ray cluster: ``local``, ``auto`` or ``HOST:PORT``; None: this machine.
        workers: simulators of a policy; None: as many as the environment's own default.
    """

    threads: int | None = None
    processes: int | None = None
    ray: str | None = None
    workers: int | None = None

    def require(self) -> None:
        """Refuse before any work a cluster that cannot be used.

        Raises:
            MissingPackageError: Ray is not installed.
        """
        if self.ray is not None and self.processes is None:
            require("running on a Ray cluster", "scale", "ray")

    def fitted(self, policy: Any) -> Resources:
        """The same with a number of threads: what a policy is worth, where none was chosen.

        Args:
            policy: whose ``module`` is looked at, if it has one.

        Raises:
            ResourceError: more than there are cores.
        """
        if self.ray is not None:
            return replace(self, threads=self.threads or 1)
        module = getattr(policy, "module", None)
        known = module if isinstance(module, nn.Module) else nn.Identity()
        return replace(self, threads=chosen_threads(known, self.threads))

    def executor(self, episodes: int, policy_bytes: int, simulators: int = 1) -> Executor:
        """Who evaluates so many episodes of a policy of that size; see :func:`place`."""
        return place(
            ray=self.ray,
            processes=self.processes,
            threads=self.threads or 1,
            episodes=episodes,
            policy_bytes=policy_bytes,
            simulators=simulators,
        )


@dataclass(frozen=True)
class Episodes:
    """Episodes of Meta-World: every task with every seed from ``first_seed`` on.

    Attributes:
        count: per task; 0: none.
        tasks: by name; None: those that the policy was admitted to.
        first_seed: demonstrations use seeds far above.
    """

    count: int = 20
    tasks: Sequence[str] | None = None
    first_seed: int = 0

    def chosen(self, source: str) -> list[str]:
        """The tasks of a policy.

        Raises:
            PolicyError: none were named, and the policy does not say which it was admitted to.
        """
        return list(self.tasks or benchmark_tasks(source)) if self.count else []


@dataclass(frozen=True)
class Journals:
    """Finished episodes of a comparison, and what they depend on."""

    folder: Path
    identity: Mapping[str, Any]

    def discard(self) -> None:
        """Start over."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()


def sweep_in_metaworld(
    rows: Sequence[SweepRow],
    source: str,
    episodes: Episodes,
    open_loop: OpenLoop | None,
    resources: Resources,
    *,
    policy_bytes: int,
    journals: Journals | None = None,
    say: Say,
    progress: Progress,
) -> Comparison:
    """Evaluate rows of one policy; without a simulator, say what to install and run open loop.

    Args:
        source: the policy, whose tasks are taken where none are named.
        policy_bytes: the policy in full precision, in memory.
        journals: keep finished episodes there, and take those that are there.

    Raises:
        PolicyError: no tasks are named or known.
        SimulatorUnavailable: there is no simulator and nothing else to do.
        OmegaError: as :func:`run_sweep`.
    """
    tasks = episodes.chosen(source)
    together = TOGETHER if resources.workers is None else resources.workers
    count = len(rows) * len(tasks) * episodes.count
    executor = resources.executor(count, policy_bytes, together)
    if executor.description:
        say(executor.description)
    run = partial(run_sweep, rows, open_loop=open_loop, progress=progress)
    if episodes.count == 0:
        return run(closed_loop=None, executor=executor)
    try:
        with SimulatorPool(together) as pool:
            closed = ClosedLoop(
                pool,
                tasks,
                range(episodes.first_seed, episodes.first_seed + episodes.count),
                together=together,
                journals=None if journals is None else journals.folder,
                identity={} if journals is None else journals.identity,
            )
            return run(closed_loop=closed, executor=executor)
    except SimulatorUnavailable as error:
        if open_loop is None:
            raise
        say(f"no closed loop: {error}")
        executor = resources.executor(count, policy_bytes, together)
        return run(closed_loop=None, executor=executor)


def require_simulator() -> None:
    """Refuse before any work where Meta-World is not installed.

    Raises:
        SimulatorUnavailable: says what to install.
    """
    try:
        require("the Meta-World simulator", "sim", "metaworld", "mujoco")
    except MissingPackageError as error:
        raise SimulatorUnavailable(str(error)) from error


def simulated(episodes: int, say: Say) -> int:
    """The episodes that can be run: none where there is no simulator, which is said."""
    try:
        if episodes:
            require_simulator()
        return episodes
    except SimulatorUnavailable as error:
        say(f"no closed loop: {error}")
        return 0
