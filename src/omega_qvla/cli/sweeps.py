"""Where the commands that run the simulator meet the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omega_qvla.cli.options import Execution, Simulation, names_of
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sources import checkpoint_bytes, resident_bytes
from omega_qvla.errors import (
    MissingPackageError,
    PolicyError,
    SimulatorUnavailable,
    UsageError,
)
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.comparison import FULL_PRECISION
from omega_qvla.evaluation.execution.blueprint import Built
from omega_qvla.evaluation.execution.building import artifact_blueprint, full_blueprint
from omega_qvla.evaluation.execution.placing import place
from omega_qvla.evaluation.execution.plan import ClosedLoop, OpenLoop, SweepRow
from omega_qvla.evaluation.footprints import artifact_footprint
from omega_qvla.evaluation.outlier_injection import condition_name, outlier_injected
from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.extras import require
from omega_qvla.policies.checkpoints.choices import Choices
from omega_qvla.policies.loading import load_policy
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.runtime.loading import load

TOGETHER = 8
"""Episodes of Meta-World that advance together."""


def sweep(
    screen: Screen,
    rows: Sequence[SweepRow],
    options: Simulation,
    open_loop: OpenLoop | None,
    tasks: Sequence[str] | None,
    source: str,
    policy_bytes: int,
    bars: Callable[[str, int, int], None] | None = None,
    journals: Journals | None = None,
) -> dict[str, Any]:
    """Run a sweep; without a simulator, say what to install and run the open-loop part."""
    episodes: int = options.episodes  # type: ignore[attr-defined]
    if bars is None:
        with screen.bars() as own:
            return sweep(
                screen, rows, options, open_loop, tasks, source, policy_bytes, own, journals
            )
    seeds = range(options.seed, options.seed + episodes)
    chosen = (tasks or benchmark_tasks(source)) if episodes else []
    together = TOGETHER if options.workers is None else options.workers
    place_rows = partial(
        place,
        ray=options.ray,
        processes=options.processes,
        threads=options.threads,
        episodes=len(rows) * len(chosen) * episodes,
        policy_bytes=policy_bytes,
        simulators=together,
    )
    executor = place_rows()
    if executor.description:
        screen.say(executor.description)
    run = partial(run_sweep, rows, open_loop=open_loop, progress=bars)
    if episodes == 0:
        return run(closed_loop=None, executor=executor)
    try:
        with SimulatorPool(together) as pool:
            closed = ClosedLoop(pool, chosen, seeds, together=together)
            if journals is not None:
                closed = replace(closed, journals=journals.folder, identity=journals.identity)
            return run(closed_loop=closed, executor=executor)
    except SimulatorUnavailable as error:
        if open_loop is None:
            raise
        screen.say(f"no closed loop: {error}")
        return run(closed_loop=None, executor=place_rows())


def chosen_tasks(text: str | None) -> list[str] | None:
    """The tasks of Meta-World that were named; None leaves the choice to the policy.

    Raises:
        UsageError: one is unknown, or none is named.
    """
    names = names_of(text)
    unknown = [name for name in names or () if name not in TASKS]
    if unknown or names == []:
        raise UsageError(f"--tasks {text!r}: the tasks are {', '.join(TASKS)}")
    return names


def require_simulator() -> None:
    """Refuse before any work where Meta-World is not installed.

    Raises:
        SimulatorUnavailable: says what to install.
    """
    try:
        require("the Meta-World simulator", "sim", "metaworld", "mujoco")
    except MissingPackageError as error:
        raise SimulatorUnavailable(str(error)) from error


def closed_loop_possible(screen: Screen, episodes: int) -> bool:
    """Whether episodes were asked for and there is a simulator; a missing one is said."""
    if episodes == 0:
        return False
    try:
        require_simulator()
    except SimulatorUnavailable as error:
        screen.say(f"no closed loop: {error}")
        return False
    return True


def require_cluster(options: Execution) -> None:
    """Refuse before any work a cluster that cannot be used.

    Raises:
        MissingPackageError: Ray is not installed.
    """
    if options.ray is not None and options.processes is None:
        require("running on a Ray cluster", "scale", "ray")


@dataclass(frozen=True)
class Journals:
    """Finished episodes of a comparison, and what they depend on."""

    folder: Path
    identity: Mapping[str, Any]

    def discard(self) -> None:
        """Start over."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()


def policy_row(source: str, stress: float, choices: Choices) -> tuple[SweepRow, int]:
    """One row for ``eval``, a full-precision policy or an artifact, and its bytes in memory."""
    directory = Path(source)
    if (directory / "omega_config.json").exists():
        if stress:
            raise PolicyError(
                "outliers are injected into a full-precision policy, before quantization; "
                f"{source} is an artifact"
            )
        artifact: Any = load(directory)
        resident = artifact.resident_bytes()
        built = Built(artifact, artifact_footprint(artifact, directory))
        row = SweepRow(
            source,
            artifact.config["recipe"]["name"],
            lambda _: built,
            alone=True,
            blueprint=artifact_blueprint(directory, artifact.content_hash),
        )
        return row, resident
    policy = load_policy(source, choices)
    blueprint = full_blueprint(
        source,
        choices,
        weights_fingerprint(policy),
        stress,
        seed=0,
        probe=None,
        checkpoint_bytes=checkpoint_bytes(source),
    )
    row = SweepRow(
        source,
        FULL_PRECISION,
        partial(blueprint.build, loaded=lambda: outlier_injected(policy, stress)),
        condition_name(stress),
        blueprint=blueprint,
    )
    return row, resident_bytes(policy)
