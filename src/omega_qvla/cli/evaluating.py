"""``eval``: one policy in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from omega_qvla.claims import Claim
from omega_qvla.cli.options import (
    COUNT,
    MAGNITUDE,
    Checkpoint,
    Common,
    Positional,
    Simulation,
    chosen_tasks,
    names_of,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.errors import OutputError, RecipeError
from omega_qvla.evaluation.closed_loop import (
    Episodes,
    Journals,
    require_simulator,
    sweep_in_metaworld,
)
from omega_qvla.evaluation.execution.plan import ClosedLoop
from omega_qvla.evaluation.simulators.libero import (
    FACTORY,
    PROTOCOLS,
    convention_of,
    environment_options,
    per_suite,
    suite_tasks,
)
from omega_qvla.evaluation.simulators.libero import chosen_tasks as libero_tasks
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.subjects import identity_of, policy_row
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.results.rows import Evaluation
from omega_qvla.results.statistics import wilson_interval

LIBERO_PATIENCE_S = 1800.0
"""Building a LIBERO scene on a busy machine takes minutes."""


LIBERO_WORKERS = 2


@dataclass(frozen=True)
class Eval(Simulation, Checkpoint, Common):
    """Run a policy or an artifact in the simulator."""

    policy: Positional[str] = tyro.MISSING
    env: Annotated[Literal["metaworld", "libero"], tyro.conf.arg(help="the simulator")] = (
        "metaworld"
    )
    tasks: Annotated[str | None, tyro.conf.arg(help="comma-separated; default: admitted")] = None
    episodes: Annotated[
        int | None, tyro.conf.arg(help="of Meta-World: episodes per task, 20 by default"), COUNT
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
        tyro.conf.arg(help="of LIBERO: interpreter of the environment it is installed in"),
    ] = None
    out: Annotated[Path | None, tyro.conf.arg(help="of LIBERO: keep finished episodes here")] = None
    resume: Annotated[bool, tyro.conf.arg(help="keep the episodes already finished")] = False

    def kept(self) -> str | None:
        return f"finished episodes are kept in {self.out}" if self.out is not None else None

    def run(self, screen: Screen) -> int:
        self.resources.require()
        torch.set_num_threads(self.threads)
        if self.env == "libero":
            return self._libero(screen)
        tasks = chosen_tasks(self.tasks)
        require_simulator()
        row, resident = policy_row(self.policy, self.stress, self.choices)
        episodes = Episodes(20 if self.episodes is None else self.episodes, tasks, self.seed)
        with screen.bars() as bars:
            document = sweep_in_metaworld(
                [row],
                self.policy,
                episodes,
                None,
                self.resources,
                policy_bytes=resident,
                say=screen.say,
                progress=bars,
            )
        (result,) = document.rows
        save(self.json, Evaluation(row=result).to_json())
        for task, (solved, episodes) in result.success.items():
            screen.say(f"{task:24s} {solved}/{episodes}")
        assert result.success_ci95 is not None
        low, high = result.success_ci95
        screen.say(f"{'all':24s} {result.success_mean:.1%}  [{low:.1%}, {high:.1%}]")
        if result.smoke:
            screen.say("fewer than 100 episodes a task: a smoke test, not a measurement")
        return 0

    def _libero(self, screen: Screen) -> int:
        """The paper's table: success per suite."""
        if self.episodes is not None:
            raise RecipeError(
                "LIBERO's protocols fix the episodes: give --protocol paper or full instead of "
                "--episodes"
            )
        tasks = libero_tasks(names_of(self.tasks)) or suite_tasks(self.suite)
        with nullcontext() if self.out is None else Claim(self.out):
            self._require_free()
            return self._libero_table(screen, tasks)

    def _require_free(self) -> None:
        """Finished episodes are kept: continued, or discarded by name."""
        there = [] if self.out is None else list((self.out / "journals").glob("*.jsonl"))
        if there and not (self.resume or self.overwrite):
            raise OutputError(
                f"{self.out} has finished episodes: continue with --resume, or start again with "
                "--overwrite"
            )

    def _libero_table(self, screen: Screen, tasks: Sequence[str]) -> int:
        row, resident = policy_row(self.policy, self.stress, self.choices)
        policy: Any = row.build(lambda _what, _done, _total: None).policy
        config = policy.config
        options = environment_options(
            policy.family, config.cameras, config.state_dim, config.robot_action_dim
        )
        convention = convention_of(policy.family)
        pool = SimulatorPool(
            LIBERO_WORKERS if self.workers is None else self.workers,
            FACTORY,
            options,
            timeout_s=LIBERO_PATIENCE_S,
            python=None if self.simulator_python is None else str(self.simulator_python),
        )
        trials = range(PROTOCOLS[self.protocol])
        journals = None
        if self.out is not None:
            journals = Journals(self.out / "journals", {"weights": identity_of(row)})
            if not self.resume:
                journals.discard()
        executor = self.resources.executor(len(tasks) * len(trials), resident)
        screen.say(
            f"LIBERO, {self.protocol} protocol: {len(trials)} recorded initial states of each of "
            f"{len(tasks)} tasks, {convention.execute} action(s) of each chunk"
        )
        screen.say(
            "this project has measured no published checkpoint on LIBERO: see first that full "
            "precision reaches its published figure"
        )
        closed = ClosedLoop(pool, tasks, trials, execute=convention.execute)
        if journals is not None:
            closed = replace(closed, journals=journals.folder, identity=journals.identity)
        with pool, screen.bars() as bars:
            document = run_sweep(
                [row],
                closed_loop=closed,
                open_loop=None,
                progress=bars,
                executor=executor,
            )
        (measured,) = document.rows
        suites = per_suite(measured.success)
        labels = {"benchmark": "libero", "protocol": self.protocol, "suites": suites}
        result = measured.model_copy(update=labels)
        save(self.json, Evaluation(row=result).to_json())
        for suite, (solved, episodes) in suites.items():
            low, high = wilson_interval(solved, episodes)
            rate = f"{solved / episodes:.1%}  [{low:.1%}, {high:.1%}]"
            screen.say(f"{suite:10s} {solved}/{episodes}  {rate}")
        assert result.success_ci95 is not None
        low, high = result.success_ci95
        screen.say(f"{'all':10s} {result.success_mean:.1%}  [{low:.1%}, {high:.1%}]")
        return 0
