"""``eval``: one policy in a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from omega_qvla.cli.options import (
    COUNT,
    MAGNITUDE,
    Checkpoint,
    Common,
    PolicyName,
    Positional,
    Simulation,
    chosen_tasks,
    names_of,
    option,
    save,
)

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen
    from omega_qvla.results.rows import Row


@dataclass(frozen=True)
class Eval(Simulation, Checkpoint, Common):
    """Run a policy or an artifact in the simulator."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla eval builtin:tiny-pi05 --episodes 5",
        "omega-qvla eval out/mine --env libero --suite spatial --simulator-python PYTHON",
        "omega-qvla eval out/mine --env my_robot:make --tasks pick,place",
    )
    policy: Positional[PolicyName] = tyro.MISSING
    env: Annotated[
        str,
        option(
            metavar="metaworld|libero|MODULE:CALLABLE",
            help="the last is your own: it is given a task's name and returns a gymnasium.Env "
            "(docs/evaluate-your-robot.md)",
        ),
    ] = "metaworld"
    tasks: Annotated[
        str | None,
        option(
            metavar="TASK,..",
            help="those the policy was admitted to by default; needed with your own --env",
        ),
    ] = None
    episodes: Annotated[
        int | None,
        option(metavar="N", help="per task, 20 by default; LIBERO's protocols fix it"),
        COUNT,
    ] = None
    execute: Annotated[
        int | None,
        option(
            metavar="N", help="of your own --env: actions carried out of each chunk, 5 by default"
        ),
        COUNT,
    ] = None
    stress: Annotated[
        float, option(metavar="MAGNITUDE", help="of injected outliers; 0: none"), MAGNITUDE
    ] = 0.0
    suite: Annotated[
        str | None,
        option(metavar="SUITE,..", help="of LIBERO: spatial, object, goal, long; all by default"),
    ] = None
    protocol: Annotated[
        Literal["paper", "full"] | None,
        option(help="of LIBERO: 10 trials per task as in the paper (default), or all 50"),
    ] = None
    simulator_python: Annotated[
        Path | None,
        option(
            metavar="PYTHON", help="of LIBERO or your own --env: the interpreter it is installed in"
        ),
    ] = None
    out: Annotated[
        Path | None,
        option(metavar="DIR", help="of LIBERO or your own --env: keep finished episodes here"),
    ] = None
    resume: Annotated[bool, option(help="keep the episodes already finished")] = False

    def kept(self) -> str | None:
        return f"finished episodes are kept in {self.out}" if self.out is not None else None

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.evaluation import evaluate

        tasks = chosen_tasks(self.tasks) if self.env == "metaworld" else names_of(self.tasks)
        with screen.bars() as bars:
            document = evaluate(
                self.policy,
                self.env,
                tasks=tasks,
                episodes=self.episodes,
                seed=self.seed,
                execute=self.execute,
                stress=self.stress,
                suite=self.suite,
                protocol=self.protocol,
                simulator_python=self.simulator_python,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                choices=self.choices,
                resources=self.resources,
                say=screen.say,
                progress=bars,
            )
        save(self.json, document.to_json())
        _tell(screen, document.row)
        return 0


def _tell(screen: Screen, row: Row) -> None:
    """Success per suite where there are some, else per task, and over all."""
    from omega_qvla.results.statistics import wilson_interval

    assert row.success_mean is not None and row.success_ci95 is not None
    width = 24 if row.suites is None else 10
    for suite, (solved, episodes) in (row.suites or {}).items():
        low, high = wilson_interval(solved, episodes)
        rate = f"{solved / episodes:.1%}  [{low:.1%}, {high:.1%}]"
        screen.say(f"{suite:{width}s} {solved}/{episodes}  {rate}")
    for task, (solved, episodes) in row.success.items() if row.suites is None else ():
        screen.say(f"{task:{width}s} {solved}/{episodes}")
    low, high = row.success_ci95
    screen.say(f"{'all':{width}s} {row.success_mean:.1%}  [{low:.1%}, {high:.1%}]")
    if row.suites is None and row.smoke:
        screen.say("fewer than 100 episodes a task: a smoke test, not a measurement")
