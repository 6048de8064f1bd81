"""``eval``: one policy in the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from omega_qvla.artifact.claims import Claim
from omega_qvla.cli.options import (
    COUNT,
    MAGNITUDE,
    Checkpoint,
    Common,
    Positional,
    Simulation,
    names_of,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sweeps import (
    Journals,
    chosen_tasks,
    policy_row,
    require_cluster,
    require_simulator,
    sweep,
)
from omega_qvla.errors import OutputError, RecipeError, UsageError
from omega_qvla.evaluation.execution.placing import place
from omega_qvla.evaluation.execution.plan import ClosedLoop, SweepRow
from omega_qvla.evaluation.simulators.libero_suites import (
    FACTORY,
    PROTOCOLS,
    convention_of,
    environment_options,
    per_suite,
    suite_tasks,
)
from omega_qvla.evaluation.simulators.libero_suites import chosen_tasks as libero_tasks
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.results.statistics import wilson_interval

OTHER_PATIENCE_S = 1800.0
"""Building a LIBERO scene on a busy machine takes minutes."""
OTHER_WORKERS = 2


@dataclass(frozen=True)
class Eval(Simulation, Checkpoint, Common):
    """Run a policy or an artifact in the simulator."""

    policy: Positional[str] = tyro.MISSING
    env: Annotated[
        str,
        tyro.conf.arg(
            help="metaworld, libero, or MODULE:CALLABLE of your own, which is given a task's name "
            "and returns a gymnasium.Env (docs/evaluate-your-robot.md)"
        ),
    ] = "metaworld"
    tasks: Annotated[
        str | None,
        tyro.conf.arg(help="comma-separated; default: admitted; of your own --env: needed"),
    ] = None
    episodes: Annotated[
        int | None, tyro.conf.arg(help="per task, 20 by default; LIBERO's protocols fix it"), COUNT
    ] = None
    execute: Annotated[
        int | None,
        tyro.conf.arg(help="of your own --env: actions carried out of each chunk, 5 by default"),
        COUNT,
    ] = None
    stress: Annotated[float, tyro.conf.arg(help="outlier magnitude, 0 for none"), MAGNITUDE] = 0.0
    suite: Annotated[
        str, tyro.conf.arg(help="of LIBERO: spatial, object, goal, long, several or all")
    ] = "all"
    protocol: Annotated[
        Literal["paper", "full"],
        tyro.conf.arg(help="of LIBERO: 10 trials per task, as in the paper, or all 50"),
    ] = "paper"
    simulator_python: Annotated[
        Path | None,
        tyro.conf.arg(help="of LIBERO or your own --env: the interpreter it is installed in"),
    ] = None
    out: Annotated[
        Path | None,
        tyro.conf.arg(help="of LIBERO or your own --env: keep finished episodes here"),
    ] = None
    resume: Annotated[bool, tyro.conf.arg(help="keep the episodes already finished")] = False

    def kept(self) -> str | None:
        return f"finished episodes are kept in {self.out}" if self.out is not None else None

    def run(self, screen: Screen) -> int:
        require_cluster(self)
        torch.set_num_threads(self.threads)
        if self.execute is not None and ":" not in self.env:
            raise UsageError("--execute is for an environment of your own; the others fix it")
        if self.env != "metaworld":
            with nullcontext() if self.out is None else Claim(self.out):
                self._require_free()
                return self._libero(screen) if self.env == "libero" else self._own(screen)
        tasks = chosen_tasks(self.tasks)
        require_simulator()
        row, resident = policy_row(self.policy, self.stress, self.choices)
        options = replace(self, episodes=20 if self.episodes is None else self.episodes)
        document = sweep(screen, [row], options, None, tasks, self.policy, resident)
        result = {**document["rows"][0], **artifact_labels(Path(self.policy))}
        self._tell(screen, result)
        return 0

    def _tell(self, screen: Screen, result: Mapping[str, Any]) -> None:
        """Success per task, for those simulators whose tasks stand for themselves."""
        save(self.json, {"schema": 1, "row": result})
        for task, (solved, episodes) in result["success"].items():
            screen.say(f"{task:24s} {solved}/{episodes}")
        low, high = result["success_ci95"]
        screen.say(f"{'all':24s} {result['success_mean']:.1%}  [{low:.1%}, {high:.1%}]")
        if result["smoke"]:
            screen.say("fewer than 100 episodes a task: a smoke test, not a measurement")

    def _require_free(self) -> None:
        """Finished episodes are kept: continued, or discarded by name."""
        there = [] if self.out is None else list((self.out / "journals").glob("*.jsonl"))
        if there and not (self.resume or self.overwrite):
            raise OutputError(
                f"{self.out} has finished episodes: continue with --resume, or start again with "
                "--overwrite"
            )

    def _own(self, screen: Screen) -> int:
        """An environment of the user's."""
        tasks = names_of(self.tasks)
        if ":" not in self.env:
            raise UsageError(
                f"--env {self.env!r}: give metaworld, libero, or MODULE:CALLABLE of your own"
            )
        if not tasks:
            raise UsageError(
                f"--env {self.env} needs --tasks: the names that {self.env.partition(':')[2]} is "
                "called with, comma-separated"
            )
        row, resident = policy_row(self.policy, self.stress, self.choices)
        seeds = range(self.seed, self.seed + (20 if self.episodes is None else self.episodes))
        execute = 5 if self.execute is None else self.execute
        result = self._run(screen, row, resident, tasks, seeds, execute, {})
        self._tell(screen, result | {"environment": self.env, "execute": execute})
        return 0

    def _libero(self, screen: Screen) -> int:
        """The paper's table: success per suite."""
        if self.episodes is not None:
            raise RecipeError(
                "LIBERO's protocols fix the episodes: give --protocol paper or full instead of "
                "--episodes"
            )
        tasks = libero_tasks(names_of(self.tasks)) or suite_tasks(self.suite)
        row, resident = policy_row(self.policy, self.stress, self.choices)
        policy: Any = row.build(lambda _what, _done, _total: None).policy
        config = policy.config
        options = environment_options(
            policy.family, config.cameras, config.state_dim, config.robot_action_dim
        )
        execute = convention_of(policy.family).execute
        trials = range(PROTOCOLS[self.protocol])
        screen.say(
            f"LIBERO, {self.protocol} protocol: {len(trials)} recorded initial states of each of "
            f"{len(tasks)} tasks, {execute} action(s) of each chunk"
        )
        screen.say(
            "this project has measured no published checkpoint on LIBERO: see first that full "
            "precision reaches its published figure"
        )
        result = self._run(screen, row, resident, tasks, trials, execute, options)
        result |= {"benchmark": "libero", "protocol": self.protocol}
        result["suites"] = per_suite(result["success"])
        save(self.json, {"schema": 1, "row": result})
        for suite, (solved, episodes) in result["suites"].items():
            low, high = wilson_interval(solved, episodes)
            rate = f"{solved / episodes:.1%}  [{low:.1%}, {high:.1%}]"
            screen.say(f"{suite:10s} {solved}/{episodes}  {rate}")
        low, high = result["success_ci95"]
        screen.say(f"{'all':10s} {result['success_mean']:.1%}  [{low:.1%}, {high:.1%}]")
        return 0

    def _run(
        self,
        screen: Screen,
        row: SweepRow,
        resident: int,
        tasks: Sequence[str],
        seeds: Sequence[int],
        execute: int,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The row of a simulator other than Meta-World."""
        pool = SimulatorPool(
            OTHER_WORKERS if self.workers is None else self.workers,
            FACTORY if self.env == "libero" else self.env,
            options,
            timeout_s=OTHER_PATIENCE_S,
            python=None if self.simulator_python is None else str(self.simulator_python),
        )
        closed = ClosedLoop(pool, tasks, seeds, execute=execute)
        if self.out is not None:
            journals = Journals(self.out / "journals", {"weights": identity_of(row)})
            if not self.resume:
                journals.discard()
            closed = replace(closed, journals=journals.folder, identity=journals.identity)
        executor = place(
            ray=self.ray,
            processes=self.processes,
            threads=self.threads,
            episodes=len(tasks) * len(seeds),
            policy_bytes=resident,
        )
        with pool, screen.bars() as bars:
            document = run_sweep(
                [row], closed_loop=closed, open_loop=None, progress=bars, executor=executor
            )
        return {**document["rows"][0], **artifact_labels(Path(self.policy))}


def identity_of(row: SweepRow) -> str:
    """What fixes the weights of a row of ``eval``: their fingerprint, or the artifact's hash."""
    assert row.blueprint is not None
    arguments = row.blueprint.arguments
    return str(arguments.get("weights") or arguments.get("content_hash"))


def artifact_labels(directory: Path) -> dict[str, Any]:
    """What a row says of an artifact evaluated alone, with nothing to compare it to."""
    if not (directory / "omega_config.json").exists():
        return {}
    return {"action_error": None, "smoothness": None}
