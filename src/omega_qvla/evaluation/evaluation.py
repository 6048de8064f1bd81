"""One policy in a simulator: the embedded one, LIBERO, or an environment of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.claims import Claim
from omega_qvla.errors import OutputError, UsageError, did_you_mean
from omega_qvla.evaluation.closed_loop import (
    Episodes,
    Journals,
    Resources,
    require_simulator,
    sweep_in_metaworld,
)
from omega_qvla.evaluation.execution.evaluate import Progress
from omega_qvla.evaluation.execution.plan import ClosedLoop, SweepRow
from omega_qvla.evaluation.openloop import Sampler
from omega_qvla.evaluation.simulators.libero_conventions import convention_of, environment_options
from omega_qvla.evaluation.simulators.libero_suites import (
    FACTORY,
    PROTOCOLS,
    chosen_tasks,
    per_suite,
    suite_tasks,
)
from omega_qvla.evaluation.simulators.pool import SimulatorPool
from omega_qvla.evaluation.subjects import Say, identity_of, policy_in_memory, policy_row
from omega_qvla.evaluation.sweep import run_sweep
from omega_qvla.results.rows import Evaluation, Row
from omega_qvla.threads import torch_threads

EPISODES, EXECUTE, WORKERS = 20, 5, 2
"""Per task; actions carried out of each chunk, and simulators, of other than Meta-World."""
PATIENCE_S = 1800.0
"""Building a scene on a busy machine takes minutes."""


@dataclass(frozen=True)
class _Run:
    """What is run of a simulator other than Meta-World."""

    factory: str
    tasks: Sequence[str]
    seeds: Sequence[int]
    execute: int
    options: Mapping[str, Any]

    def closed_loop(self, resources: Resources, python: str | None) -> ClosedLoop:
        """The same with its simulators, in an interpreter of their own or in this one."""
        workers = WORKERS if resources.workers is None else resources.workers
        pool = SimulatorPool(
            workers, self.factory, self.options, timeout_s=PATIENCE_S, python=python
        )
        return ClosedLoop(pool, self.tasks, self.seeds, execute=self.execute)


def evaluate(
    policy: str | Path | Sampler,
    env: str = "metaworld",
    *,
    tasks: Sequence[str] | None = None,
    episodes: int | None = None,
    seed: int = 0,
    execute: int | None = None,
    stress: float = 0.0,
    suite: str | None = None,
    protocol: Literal["paper", "full"] | None = None,
    simulator_python: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    choices: CheckpointOptions | None = None,
    resources: Resources | None = None,
    say: Say = lambda _line: None,
    progress: Progress = lambda _what, _done, _total: None,
) -> Evaluation:
    """Run a policy in a simulator and count how often it succeeds.

    Args:
        policy: a name or directory, as for ``load_policy``, of a policy or an artifact; or a policy
            in memory (its ``noise_shape`` is needed), which runs in this process alone.
        env: ``metaworld``, ``libero``, or ``module:callable`` of your own, which is called with a
            task's name and returns a ``gymnasium.Env`` (docs/evaluate-your-robot.md).
        tasks: by name; None: those the policy was admitted to, or LIBERO's suite.
        episodes: per task; None: 20.  LIBERO's protocols fix it.
        seed: of the first episode; the next ones follow.  LIBERO's are its recorded states.
        execute: of your own environment: actions carried out of each chunk; None: 5.
        stress: magnitude of injected outliers; 0: none.
        suite: of LIBERO: which tasks; None: all.
        protocol: of LIBERO: 10 (``paper``, None) or 50 (``full``) trials of each.
        simulator_python: of LIBERO or your own environment: the interpreter it is installed in.
        out: of LIBERO or your own environment: finished episodes are kept here.
        resume: keep the episodes that are there already.
        overwrite: discard them.
        choices: answers to what the checkpoint does not say.
        resources: where the policy computes; None: this process, more if it is worth it.
        say: told what is decided on the way.
        progress: called with (what, episodes done, all).

    Returns:
        One row; docs/json.md describes it.

    Raises:
        SimulatorUnavailable: the simulator is not installed.
        UsageError, RecipeError: something is given that does not go with the environment.
        OutputError: ``out`` has finished episodes, or another process writes there.
        PolicyError, ResumeError, ResourceError: as ``load_policy`` and evaluations raise them.
    """
    resources = resources or Resources()
    resources.require()
    if resume and out is None:
        raise UsageError("`resume` continues what `out` keeps: give `out` as well")
    _require_sense(
        env,
        {
            "tasks": tasks,
            "episodes": episodes,
            "execute": execute,
            "suite": suite,
            "protocol": protocol,
            "simulator_python": simulator_python,
            "seed": seed or None,
            "out": out,
        },
    )
    scenes = list(tasks or ())
    if env == "libero":
        scenes = chosen_tasks(scenes) or suite_tasks(suite or "all")
    if env == "metaworld":
        require_simulator()
    folder = None if out is None else Path(out)
    count = EPISODES if episodes is None else episodes
    with nullcontext() if folder is None else Claim(folder), ExitStack() as computing:
        _require_free(folder, resume=resume, overwrite=overwrite)
        if isinstance(policy, str | Path):
            chosen = choices or CheckpointOptions()
            row, resident, loaded = policy_row(str(policy), stress, chosen)
        else:
            resources = _here(resources)
            row, resident = policy_in_memory(policy)
            loaded = policy
        resources = resources.fitted(loaded)
        computing.enter_context(torch_threads(resources.threads or 1))
        if env == "metaworld":
            found = sweep_in_metaworld(
                [row],
                row.policy,
                Episodes(count, tasks, seed),
                None,
                resources,
                policy_bytes=resident,
                say=say,
                progress=progress,
            )
            return Evaluation(row=found.rows[0])
        labels: dict[str, Any]
        if env == "libero":
            trials = protocol or "paper"
            run, labels = _libero(row, scenes, trials, say), {"benchmark": "libero"}
            labels["protocol"] = trials
        else:
            steps = EXECUTE if execute is None else execute
            run = _Run(env, scenes, range(seed, seed + count), steps, {})
            labels = {"environment": env, "execute": steps}
        python = None if simulator_python is None else str(simulator_python)
        closed = run.closed_loop(resources, python)
        if folder is not None:
            journals = Journals(folder / "journals", {"weights": identity_of(row)})
            if not resume:
                journals.discard()
            closed = replace(closed, journals=journals.folder, identity=journals.identity)
        executor = resources.executor(len(run.tasks) * len(run.seeds), resident)
        with closed.pool:
            found = run_sweep(
                [row], closed_loop=closed, open_loop=None, progress=progress, executor=executor
            )
    (measured,) = found.rows
    if env == "libero":
        labels["suites"] = per_suite(measured.success)
    return Evaluation(row=Row.model_validate(measured.model_dump() | labels))


_ONLY = {
    "suite": ("libero",),
    "protocol": ("libero",),
    "simulator_python": ("libero", "your own"),
    "out": ("libero", "your own"),
    "episodes": ("metaworld", "your own"),
    "execute": ("your own",),
    "seed": ("metaworld", "your own"),
}
"""What goes with some environments alone."""


def _require_sense(env: str, given: Mapping[str, Any]) -> None:
    """Refuse what does not go with an environment, instead of leaving it out.

    Raises:
        UsageError: names it, and what it is for.
    """
    kind = env if env in ("metaworld", "libero") else "your own"
    if kind == "your own" and ":" not in env:
        hint = did_you_mean(env, ("metaworld", "libero"))
        raise UsageError(
            f"`env={env}`: give metaworld, libero, or MODULE:CALLABLE of your own{hint}"
        )
    for name, kinds in _ONLY.items():
        if given[name] is not None and kind not in kinds:
            instead = "; `protocol` (paper or full) fixes LIBERO's" if name == "episodes" else ""
            raise UsageError(
                f"`{name}` is for {' or '.join(kinds)} as `env`, not for {env}: leave it "
                f"out{instead}"
            )
    if given["suite"] is not None and given["tasks"]:
        raise UsageError("`suite` and `tasks` both choose LIBERO's tasks: give one of them")
    if kind == "your own" and not given["tasks"]:
        raise UsageError(
            f"`env={env}` needs `tasks`: the names that {env.partition(':')[2]} is called with"
        )


def _require_free(out: Path | None, *, resume: bool, overwrite: bool) -> None:
    """Finished episodes are kept: continued, or discarded by name."""
    there = [] if out is None else list((out / "journals").glob("*.jsonl"))
    if there and not (resume or overwrite):
        raise OutputError(
            f"{out} has finished episodes: continue with `resume=True`, or start again with "
            "`overwrite=True`"
        )


def _here(resources: Resources) -> Resources:
    """A policy in memory runs where it is.

    Raises:
        UsageError: it was to run elsewhere.
    """
    if resources.ray is not None or resources.processes not in (None, 1):
        raise UsageError(
            "a policy in memory runs in this process; give its name or directory instead, so that "
            "others can load it"
        )
    return replace(resources, processes=1)


def _libero(row: SweepRow, tasks: Sequence[str], protocol: str, say: Say) -> _Run:
    """LIBERO with a policy's own convention."""
    policy: Any = row.build(lambda _what, _done, _total: None).policy
    config = policy.config
    options = environment_options(
        policy.family, config.cameras, config.state_dim, config.robot_action_dim
    )
    run = _Run(
        FACTORY, tasks, range(PROTOCOLS[protocol]), convention_of(policy.family).execute, options
    )
    say(
        f"LIBERO, {protocol} protocol: {len(run.seeds)} recorded initial states of each of "
        f"{len(tasks)} tasks, {run.execute} action(s) of each chunk"
    )
    say(
        "this project has measured no published checkpoint on LIBERO: see first that full "
        "precision reaches its published figure"
    )
    return run
