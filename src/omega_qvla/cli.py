"""The command line: the only file that parses arguments or prints.

Exit status: 0 done; 1 a check failed; 2 bad input or usage; 3 not enough memory, disk or device.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import monotonic, time
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from omega_qvla.api import quantize
from omega_qvla.artifact import preflight, read_artifact, verify_artifact
from omega_qvla.calibration.lerobot import state_names
from omega_qvla.calibration.lerobot_metadata import is_dataset
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import (
    ObservationError,
    OmegaError,
    PolicyError,
    RecipeError,
    ResourceError,
    SimulatorUnavailable,
)
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.comparison import (
    FULL_PRECISION,
    Comparison,
    comparison_rows,
    discard_simulations,
)
from omega_qvla.evaluation.device_roofline import roofline
from omega_qvla.evaluation.diagnostics import diagnose
from omega_qvla.evaluation.footprints import directory_bytes, full_footprint
from omega_qvla.evaluation.kernel_speed import (
    SHAPES,
    machine_name,
    measure_bandwidth,
    measure_contention,
    measure_peaks,
    measure_shape,
    summarise,
)
from omega_qvla.evaluation.libero import (
    FACTORY,
    PROTOCOLS,
    chosen_tasks,
    convention_of,
    environment_options,
    per_suite,
    suite_tasks,
)
from omega_qvla.evaluation.llama_cpp import Ggml
from omega_qvla.evaluation.openloop import NOISES
from omega_qvla.evaluation.placing import place
from omega_qvla.evaluation.policy_speed import Subject, measure_policies
from omega_qvla.evaluation.prepare import artifact_blueprint, full_blueprint
from omega_qvla.evaluation.simulators import METAWORLD, SimulatorPool
from omega_qvla.evaluation.statistics import wilson_interval
from omega_qvla.evaluation.sweep import (
    ClosedLoop,
    Footprint,
    OpenLoop,
    SweepRow,
    run_sweep,
    write_json,
)
from omega_qvla.evaluation.trajectories import compare_tracks
from omega_qvla.evaluation.twin import condition_name, stress_twin
from omega_qvla.policies.checkpoints.choices import Choices
from omega_qvla.policies.loading import (
    builtin_directory,
    load_policy,
    policy_structure,
    stream_policy,
)
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.journal import discard_journal
from omega_qvla.quantization.pipeline import weights_fingerprint, work_shares
from omega_qvla.recipe import Recipe, Scope
from omega_qvla.report.document import write_report
from omega_qvla.report.figure import comparison_figure
from omega_qvla.report.roofline import roofline_figure
from omega_qvla.report.table import Table as TextTable
from omega_qvla.report.table import (
    bound_table,
    comparison_table,
    human_bytes,
    kernel_table,
    policy_table,
    site_table,
    task_table,
)
from omega_qvla.runtime.engine import load
from omega_qvla.runtime.kernels.cpu import available_cores
from omega_qvla.runtime.linear import best_kernel
from omega_qvla.runtime.memory import predict
from omega_qvla.training.embedded import rebuild

EVALUATION_SEED = 0
"""First seed of evaluation episodes; demonstrations use seeds far above."""

LIBERO_PATIENCE_S = 1800.0
"""Building a LIBERO scene on a busy machine takes minutes."""
FILM_SIZE = 112
"""Width and height in pixels of a film's pictures; the policy's own are smaller."""

DEMO_NOISES = 2
TOGETHER = 8
"""Episodes of Meta-World that advance together."""
LIBERO_WORKERS = 2

_PLAIN_WIDTH = 160
_WIDE_COLUMNS = ("vs full precision", "noise floor", "resident")
"""Columns that are left to the JSON and the picture, so that the table fits a terminal."""

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class _Common:
    json: Annotated[Path | None, tyro.conf.arg(help="write the result here, machine-readable")] = (
        None
    )
    debug: Annotated[bool, tyro.conf.arg(help="show a traceback on errors")] = False


@dataclass(frozen=True)
class _Simulation:
    workers: Annotated[
        int | None,
        tyro.conf.arg(
            help="simulators of a policy, whose episodes advance together and share its passes; 8, "
            "or 2 of LIBERO"
        ),
    ] = None
    threads: Annotated[int, tyro.conf.arg(help="threads of the policy")] = 1
    seed: Annotated[int, tyro.conf.arg(help="first episode seed")] = EVALUATION_SEED
    processes: Annotated[
        int | None,
        tyro.conf.arg(
            help="worker processes, each with the policy and a simulator; by default as many as "
            "cores and memory allow, if there are enough episodes"
        ),
    ] = None
    ray: Annotated[
        str | None,
        tyro.conf.arg(help="run on a Ray cluster: local, auto, or HOST:PORT of its head node"),
    ] = None


@dataclass(frozen=True)
class Demo(_Simulation, _Common):
    """The main job on the embedded policy: quantize, save, reload, run the robot, compare."""

    policy: Annotated[Literal["tiny-pi05", "tiny-gr00t"], tyro.conf.arg(help="embedded policy")] = (
        "tiny-pi05"
    )
    episodes: Annotated[int, tyro.conf.arg(help="episodes per task, method and condition")] = 4
    out: Annotated[Path, tyro.conf.arg(help="artifacts, table, picture and JSON go here")] = Path(
        "out/demo"
    )

    def run(self, screen: Screen) -> int:
        command = Compare(
            policy=f"builtin:{self.policy}",
            recipes="rtn,omega-paper,omega-w4a4",
            episodes=self.episodes,
            stress="30",
            noises=DEMO_NOISES,
            out=self.out,
            json=self.json,
            debug=self.debug,
            workers=self.workers,
            threads=self.threads,
            seed=self.seed,
            processes=self.processes,
            ray=self.ray,
        )
        status = command.run(screen)
        screen.say(f"\nthe W4A4 policy is in {self.out / 'artifacts' / 'omega-w4a4-plain'}")
        screen.say(
            f"look into it: omega-qvla inspect {self.out / 'artifacts' / 'omega-w4a4-plain'}"
        )
        return status


@dataclass(frozen=True)
class _Calibrated:
    calibration: Annotated[
        str | None,
        tyro.conf.arg(
            help="LeRobot dataset, npz file or a folder of them, builtin:NAME or, to quantize, "
            "random:COUNT; the policy's own by default"
        ),
    ] = None
    cameras: Annotated[
        str | None,
        tyro.conf.arg(
            help="of a LeRobot dataset, where its names are not the policy's: "
            "POLICYNAME=FEATURE,..; POLICYNAME=none leaves a camera out"
        ),
    ] = None
    state: Annotated[
        str | None,
        tyro.conf.arg(help="of a LeRobot dataset: features or parts of the state, comma-separated"),
    ] = None
    instruction: Annotated[
        str | None,
        tyro.conf.arg(help="for every frame of a LeRobot dataset whose tasks have no words"),
    ] = None


@dataclass(frozen=True)
class _Checkpoint:
    training_config: Annotated[
        str | None,
        tyro.conf.arg(help="of an openpi checkpoint: its name (pi05_libero) or a JSON file"),
    ] = None
    data_config: Annotated[
        str | None,
        tyro.conf.arg(help="of a GR00T checkpoint: its name (libero) or a JSON file"),
    ] = None
    embodiment: Annotated[
        str | None,
        tyro.conf.arg(help="GR00T: the robot's tag; of random:gr00t-n1.5 its number, else all"),
    ] = None
    tokenizer: Annotated[
        Path | None,
        tyro.conf.arg(help="PaliGemma's tokenizer.model, or the folder of Qwen's vocabulary"),
    ] = None

    @property
    def choices(self) -> Choices:
        """What the checkpoint leaves open, as it was answered."""
        return Choices(self.training_config, self.tokenizer, self.embodiment, self.data_config)


@dataclass(frozen=True)
class Quantize(_Calibrated, _Checkpoint, _Common):
    """Quantize a policy and save the artifact."""

    policy: Positional[str] = tyro.MISSING
    out: Annotated[Path, tyro.conf.arg(help="directory of the artifact")] = tyro.MISSING
    recipe: Annotated[str, tyro.conf.arg(help="name or YAML file")] = "omega-w4a4"
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    steps: Annotated[
        int | None, tyro.conf.arg(help="denoising steps it will run with; the checkpoint's own")
    ] = None
    device: Annotated[str, tyro.conf.arg(help="cpu")] = "cpu"
    resume: Annotated[bool, tyro.conf.arg(help="continue an interrupted run")] = False
    dry_run: Annotated[bool, tyro.conf.arg(help="only predict the memory table")] = False

    def run(self, screen: Screen) -> int:
        _require_cpu(self.device)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        if self.dry_run:
            policy = _with_steps(policy_structure(self.policy, self.choices), self.steps)
            sites = [{"name": name} for name in _covered_sites(policy, recipe)]
            content = recipe.model_dump(mode="json")
            report = _inspection(predict(policy, recipe), content, sites, best_kernel())
            screen.memory(report, f"{self.policy} with {recipe.name}, predicted")
            _write(self.json, report)
            return 0
        if not recipe.realizable:
            raise RecipeError(
                f"recipe {recipe.name!r} is a simulation: its activation scales differ along the "
                "contraction, so there are no integers to save. See it in `omega-qvla compare`"
            )
        # A recipe that cascades runs on its own results, which needs the whole policy in memory.
        read = load_policy if recipe.cascade else stream_policy
        policy = _with_steps(read(self.policy, self.choices), self.steps)
        source = self.calibration or _default_calibration(self.policy)
        observations = _calibration(source, policy, self, recipe.observations)
        screen.report(observations)
        if (self.calibration or "").startswith("random:"):
            screen.say("calibrating on noise: fit to measure speed and memory, nothing else")
        preflight(self.out, predict(policy, recipe)["total_bytes"])
        work = self.out.with_name(f".{self.out.name}.journal")
        shares = work_shares(policy, recipe)
        with screen.bar(f"quantizing with {recipe.name}", shares) as step:
            quantized = quantize(
                policy,
                observations,
                recipe,
                work_directory=work,
                resume=self.resume,
                progress=lambda done, total, site: step(done, total, site),
            )
        quantized.save_pretrained(self.out)
        discard_journal(work)
        return Inspect(directory=self.out, json=self.json).run(screen)


@dataclass(frozen=True)
class Bench(_Common):
    """Measure kernels or a whole policy, W4A4 against what PyTorch offers."""

    what: Positional[Literal["kernels", "policy"]] = tyro.MISSING
    policy: Annotated[str, tyro.conf.arg(help="for `policy`: in full precision")] = (
        "builtin:tiny-pi05"
    )
    artifact: Annotated[
        Path | None, tyro.conf.arg(help="for `policy`: the same policy as a W4A4 artifact")
    ] = None
    kernel: Annotated[str | None, tyro.conf.arg(help="our integer kernel; the best by default")] = (
        None
    )
    llama_cpp: Annotated[
        Path | None,
        tyro.conf.arg(help="for `kernels`: folder of llama.cpp's libraries, to measure its Q4_0"),
    ] = None
    threads: Annotated[int, tyro.conf.arg(help="threads of every peer")] = 1
    rounds: Annotated[int, tyro.conf.arg(help="turns that every peer takes")] = 9
    sites: Annotated[str, tyro.conf.arg(help="for `kernels`: only sites containing this")] = ""
    figure: Annotated[Path | None, tyro.conf.arg(help="for `kernels`: roofline as PNG")] = None
    roofline: Annotated[
        Literal["orin", "thor", "4090", "h200"] | None,
        tyro.conf.arg(
            help="for `policy`: measure nothing; calculate the least time on this device"
        ),
    ] = None
    device: Annotated[str, tyro.conf.arg(help="cpu")] = "cpu"

    def run(self, screen: Screen) -> int:
        _require_cpu(self.device)
        if self.rounds < 1:
            raise RecipeError(f"--rounds {self.rounds}: at least one is needed")
        if self.roofline is not None:
            return self._roofline(screen, self.roofline)
        return self._kernels(screen) if self.what == "kernels" else self._policy(screen)

    def _roofline(self, screen: Screen, device: str) -> int:
        if self.what != "policy":
            raise RecipeError("--roofline is for `bench policy`; `bench kernels` draws --figure")
        found = roofline(device, policy=self.policy, artifact=self.artifact)
        screen.table(bound_table(found))
        _write(self.json, {"schema": 1, "library": version("omega-qvla"), **found})
        return 0

    def _kernels(self, screen: Screen) -> int:
        if self.figure is not None and self.json is None:
            raise RecipeError("--figure is drawn from the saved JSON: give --json FILE as well")
        shapes = [shape for shape in SHAPES if self.sites in shape.site]
        if not shapes:
            known = ", ".join(dict.fromkeys(shape.site for shape in SHAPES))
            raise RecipeError(f"no site contains {self.sites!r}; sites: {known}")
        peaks = measure_peaks(self.threads)
        ggml = None if self.llama_cpp is None else Ggml(self.llama_cpp)
        rows: list[dict[str, Any]] = []
        with screen.bar("measuring") as step:
            for done, shape in enumerate(shapes):
                step(done, len(shapes), shape.site)
                rows += measure_shape(
                    shape,
                    rounds=self.rounds,
                    threads=self.threads,
                    peaks=peaks,
                    kernel=self.kernel,
                    llama_cpp=ggml,
                )
        summary = summarise(rows)
        document = {
            **_measurement(self.threads),
            "peak_gmacs": {name: rate / 1e9 for name, rate in peaks.items()},
            "memory_gbytes": measure_bandwidth(self.threads) / 1e9,
            "int8_engine": torch.backends.quantized.engine,
            "llama_cpp": None if ggml is None else ggml.version,
            "rows": rows,
            "summary": summary,
            "contention": [
                measure_contention(calls=400, threads=threads, kernel=self.kernel)
                for threads in range(1, available_cores() + 1)
            ],
        }
        screen.table(kernel_table(summary))
        for entry in document["contention"]:
            screen.say(
                f"{entry['threads']} thread(s), a call of {entry['idle_p50_us']:.0f} µs: p99 "
                f"{entry['idle_p99_us']:.0f} µs idle, {entry['busy_p99_us']:.0f} µs with every "
                "core busy"
            )
        _write(self.json, document)
        if self.figure is not None and self.json is not None:
            roofline_figure(self.json, self.figure)
        return 0

    def _policy(self, screen: Screen) -> int:
        subjects = [Subject(self.policy, "fp32", self.policy, self.threads)]
        if self.artifact is not None:
            source = str(self.artifact)
            subjects.append(Subject(self.policy, "w4a4", source, self.threads, self.kernel))
        with screen.bars() as bars:
            rows = measure_policies(subjects, rounds=self.rounds, progress=bars)
        screen.table(policy_table(rows))
        _write(self.json, {**_measurement(self.threads), "rows": rows})
        return 0


@dataclass(frozen=True)
class Inspect(_Common):
    """Show what an artifact holds: memory per component, recipe, sites, hash."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        quantized = load(self.directory) if not _is_torch(self.directory) else None
        if quantized is None:
            raise PolicyError(
                f"{self.directory} was made from a module of your own; inspect it from Python with "
                "load(directory, policy=...).memory_report()"
            )
        report = _inspection(
            quantized.memory_report(directory_bytes=directory_bytes(self.directory)),
            quantized.config["recipe"],
            quantized.config["sites"],
            quantized.kernel,
        )
        report["content_hash"] = quantized.content_hash
        recipe = quantized.config["recipe"]
        screen.memory(report, str(self.directory))
        screen.say(f"recipe   {recipe['name']} ({quantized.config['recipe_hash'][:16]})")
        screen.say(f"content  {quantized.content_hash}")
        screen.say(f"kernel   {quantized.kernel}; {len(quantized.sites)} quantized sites")
        notes = [f"{site.site.name}: {site.note}" for site in quantized.sites if site.note]
        for note in notes:
            screen.say(f"note     {note}")
        _write(self.json, report)
        return 0


@dataclass(frozen=True)
class Verify(_Common):
    """Check every byte of an artifact against its SHA-256."""

    directory: Positional[Path] = tyro.MISSING

    def run(self, screen: Screen) -> int:
        report = verify_artifact(self.directory)
        for failure in report.failures:
            screen.say(f"FAILED {failure}")
        screen.say(f"{report.checked} checked, {len(report.failures)} failed")
        _write(self.json, report.to_json())
        return 0 if report.ok else 1


@dataclass(frozen=True)
class Eval(_Simulation, _Checkpoint, _Common):
    """Run a policy or an artifact in the simulator."""

    policy: Positional[str] = tyro.MISSING
    env: Annotated[Literal["metaworld", "libero"], tyro.conf.arg(help="the simulator")] = (
        "metaworld"
    )
    tasks: Annotated[str | None, tyro.conf.arg(help="comma-separated; default: admitted")] = None
    episodes: Annotated[
        int | None, tyro.conf.arg(help="of Meta-World: episodes per task, 20 by default")
    ] = None
    stress: Annotated[float, tyro.conf.arg(help="outlier magnitude, 0 for none")] = 0.0
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

    def run(self, screen: Screen) -> int:
        torch.set_num_threads(self.threads)
        if self.env == "libero":
            return self._libero(screen)
        row, resident = _policy_row(self.policy, self.stress, self.choices)
        options = replace(self, episodes=20 if self.episodes is None else self.episodes)
        document = _sweep(screen, [row], options, None, _split(self.tasks), self.policy, resident)
        result = {**document["rows"][0], **_artifact_labels(Path(self.policy))}
        _write(self.json, {"schema": 1, "row": result})
        for task, (solved, episodes) in result["success"].items():
            screen.say(f"{task:24s} {solved}/{episodes}")
        low, high = result["success_ci95"]
        screen.say(f"{'all':24s} {result['success_mean']:.1%}  [{low:.1%}, {high:.1%}]")
        if result["smoke"]:
            screen.say("fewer than 100 episodes a task: a smoke test, not a measurement")
        return 0

    def _libero(self, screen: Screen) -> int:
        """The paper's table: success per suite."""
        if self.episodes is not None:
            raise RecipeError(
                "LIBERO's protocols fix the episodes: give --protocol paper or full instead of "
                "--episodes"
            )
        tasks = chosen_tasks(_split(self.tasks)) or suite_tasks(self.suite)
        row, resident = _policy_row(self.policy, self.stress, self.choices)
        policy: Any = row.build()
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
            journals = _Journals(self.out / "journals", {"weights": _identity_of(row)})
            if not self.resume:
                journals.discard()
        placement = place(
            ray=self.ray,
            processes=self.processes,
            threads=self.threads,
            episodes=len(tasks) * len(trials),
            policy_bytes=resident,
        )
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
                evaluate=placement.evaluate,
            )
        result = {**document["rows"][0], **_artifact_labels(Path(self.policy))}
        result |= {"benchmark": "libero", "protocol": self.protocol}
        result["suites"] = per_suite(result["success"])
        _write(self.json, {"schema": 1, "row": result})
        for suite, (solved, episodes) in result["suites"].items():
            low, high = wilson_interval(solved, episodes)
            rate = f"{solved / episodes:.1%}  [{low:.1%}, {high:.1%}]"
            screen.say(f"{suite:10s} {solved}/{episodes}  {rate}")
        low, high = result["success_ci95"]
        screen.say(f"{'all':10s} {result['success_mean']:.1%}  [{low:.1%}, {high:.1%}]")
        return 0


@dataclass(frozen=True)
class Compare(_Simulation, _Calibrated, _Checkpoint, _Common):
    """Compare recipes on one policy, open loop and in the simulator, on the same seeds."""

    policy: Positional[str] = tyro.MISSING
    recipes: Annotated[
        str, tyro.conf.arg(help="comma-separated names or YAML files; or: methods, ablations")
    ] = "rtn,omega-paper,omega-w4a4"
    episodes: Annotated[int, tyro.conf.arg(help="per task; 0: open loop only")] = 20
    stress: Annotated[
        str, tyro.conf.arg(help="add stress conditions: magnitudes, comma-separated; 0: none")
    ] = "0"
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    tasks: Annotated[str | None, tyro.conf.arg(help="comma-separated; default: admitted")] = None
    held_out: Annotated[
        int | None, tyro.conf.arg(help="held-out observations of the action error; all by default")
    ] = None
    noises: Annotated[int, tyro.conf.arg(help="of each held-out observation")] = NOISES
    reference: Annotated[
        Literal["each", "once"],
        tyro.conf.arg(help="full precision in each condition, or once: its twins compute the same"),
    ] = "each"
    out: Annotated[Path, tyro.conf.arg(help="artifacts, picture and JSON go here")] = Path(
        "out/compare"
    )
    resume: Annotated[bool, tyro.conf.arg(help="keep the episodes already finished")] = False

    def run(self, screen: Screen) -> int:
        torch.set_num_threads(self.threads)
        policy = load_policy(self.policy, self.choices)
        source = self.calibration or _default_calibration(self.policy)
        comparison = Comparison(
            label=self.policy,
            policy=policy,
            choices=self.choices,
            weights=weights_fingerprint(policy),
            checkpoint_bytes=_checkpoint_bytes(self.policy),
            calibration=_observations(source, policy, self),
            recipes=_split(self.recipes) or (),
            magnitudes=_magnitudes(self.stress),
            scope=self.scope,
            artifacts=self.out / "artifacts",
            reference=self.reference,
        )
        held_out = _observations(source, policy, self, split="heldout")
        if self.held_out is not None:
            held_out = held_out.spread(self.held_out)
        for observations in (comparison.calibration, held_out):
            screen.report(observations)
        journals = _Journals(
            self.out / "journals",
            {
                "weights": comparison.weights,
                "calibration": comparison.calibration.fingerprint,
            },
        )
        if not self.resume:
            journals.discard()
        with screen.bars() as bars:
            rows = comparison_rows(comparison, bars)
            document = _sweep(
                screen,
                rows,
                self,
                OpenLoop(held_out, noises=self.noises),
                _split(self.tasks),
                self.policy,
                _resident_bytes(policy),
                bars,
                journals,
            )
        discard_simulations(comparison)
        target = self.out / "results.json"
        write_json(document, target)
        _write(self.json, document)
        screen.table(comparison_table(target), without=_WIDE_COLUMNS)
        if document["rows"][0]["success"]:
            screen.table(task_table(target))
        picture = comparison_figure(target, self.out / "comparison.png")
        screen.say(f"\nresults {target}\npicture {picture}")
        return 0


@dataclass(frozen=True)
class Diagnose(_Simulation, _Calibrated, _Checkpoint, _Common):
    """Look inside a quantized policy: every site's error and range, and the robot's path."""

    policy: Positional[str] = tyro.MISSING
    recipe: Annotated[str, tyro.conf.arg(help="name or YAML file")] = "omega-w4a4"
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    stress: Annotated[float, tyro.conf.arg(help="outlier magnitude, 0 for none")] = 0.0
    observations: Annotated[int, tyro.conf.arg(help="held-out observations to look at")] = 16
    episodes: Annotated[int, tyro.conf.arg(help="per task and policy; 0: none")] = 1
    tasks: Annotated[str | None, tyro.conf.arg(help="comma-separated; default: admitted")] = None
    out: Annotated[Path, tyro.conf.arg(help="the JSON, an input of `report`")] = Path(
        "out/diagnostics.json"
    )

    def run(self, screen: Screen) -> int:
        if self.observations < 1 or self.episodes < 0:
            raise ObservationError(
                "give at least one of --observations, and no negative --episodes"
            )
        torch.set_num_threads(self.threads)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        policy = load_policy(self.policy, self.choices)
        source = self.calibration or _default_calibration(self.policy)
        calibration = _observations(source, policy, self)
        held_out = _observations(source, policy, self, split="heldout")
        full = stress_twin(policy, self.stress, probe=calibration[0])
        with screen.bars() as bars:
            quantized = quantize(
                full,
                calibration,
                recipe,
                progress=lambda done, total, _: bars(f"quantizing with {recipe.name}", done, total),
            )
            document = {
                "schema": 1,
                "kind": "diagnostics",
                "library": version("omega-qvla"),
                "policy": self.policy,
                "recipe": recipe.name,
                "recipe_hash": recipe.content_hash,
                "scope": self.scope,
                "condition": condition_name(self.stress),
                "realizable": recipe.realizable,
                **diagnose(
                    full,
                    quantized,
                    held_out.spread(self.observations),
                    progress=partial(bars, "looking into every site"),
                ),
                "memory": quantized.memory_report() if recipe.realizable else None,
                "rollouts": self._rollouts(screen, {"fp32": full, recipe.name: quantized}, bars),
            }
        write_json(document, self.out)
        _write(self.json, document)
        screen.table(site_table(document))
        screen.say(f"\ndiagnostics {self.out}; make them visible: omega-qvla report {self.out}")
        return 0

    def _rollouts(
        self, screen: Screen, policies: Mapping[str, Any], bars: _Bars
    ) -> dict[str, Any] | None:
        """The episodes; without a simulator, say what to install and go on without."""
        if self.episodes == 0:
            return None
        try:
            return compare_tracks(
                policies,
                _split(self.tasks) or benchmark_tasks(self.policy),
                range(self.seed, self.seed + self.episodes),
                environment=METAWORLD,
                replay_options={"image_size": FILM_SIZE},
                progress=partial(bars, "episodes"),
            )
        except SimulatorUnavailable as error:
            screen.say(f"no episodes: {error}")
            return None


@dataclass(frozen=True)
class Report(_Common):
    """One HTML file, and the figures as PNG, from saved JSON alone."""

    runs: Positional[tuple[Path, ...]] = ()
    out: Annotated[Path, tyro.conf.arg(help="the HTML file; figures go beside it")] = Path(
        "report.html"
    )

    def run(self, screen: Screen) -> int:
        summary = write_report(self.runs, self.out)
        for note in summary["notes"]:
            screen.say(f"note: {note}")
        _write(self.json, summary)
        screen.say(f"report {summary['report']} and {len(summary['figures'])} figures beside it")
        return 0


@dataclass(frozen=True)
class Train(_Common):
    """Rebuild an embedded policy from scratch: demonstrations, training, admission."""

    policy: Positional[Literal["tiny-pi05", "tiny-gr00t"]] = "tiny-pi05"
    out: Annotated[Path | None, tyro.conf.arg(help="the policy directory; out/POLICY")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="optimizer steps; the recipe's own")] = None
    workers: Annotated[int, tyro.conf.arg(help="simulator processes")] = 2
    threads: Annotated[int, tyro.conf.arg(help="threads of the training")] = 2

    def run(self, screen: Screen) -> int:
        out = self.out or Path("out") / self.policy
        with screen.bars() as bars:
            provenance = rebuild(
                self.policy, out, steps=self.steps, workers=self.workers, progress=bars
            )
        _write(self.json, provenance)
        screen.say(f"policy in {out}; admitted: {', '.join(provenance['admitted'])}")
        return 0


@dataclass(frozen=True)
class Serve(_Common):
    """Serve an artifact to robots, over openpi's websocket protocol or GR00T's."""

    directory: Positional[Path] = tyro.MISSING
    protocol: Annotated[Literal["openpi", "gr00t"], tyro.conf.arg(help="what robots speak")] = (
        "openpi"
    )
    host: Annotated[str, tyro.conf.arg(help="others than loopback need --token-file")] = "127.0.0.1"
    port: Annotated[int | None, tyro.conf.arg(help="8000, or 5555 for gr00t")] = None
    token_file: Annotated[Path | None, tyro.conf.arg(help="what clients must show")] = None
    metrics_port: Annotated[
        int | None, tyro.conf.arg(help="of gr00t: /healthz and /metrics over HTTP; off by default")
    ] = None
    metrics_host: Annotated[str, tyro.conf.arg(help="others than loopback need --token-file")] = (
        "127.0.0.1"
    )
    tls_certificate: Annotated[Path | None, tyro.conf.arg(help="PEM; with --tls-key")] = None
    tls_key: Annotated[Path | None, tyro.conf.arg(help="PEM")] = None
    layout: Annotated[
        Literal["native", "libero", "droid"], tyro.conf.arg(help="how robots name observations")
    ] = "native"
    batch: Annotated[int, tyro.conf.arg(help="robots computed in one pass at most")] = 8
    waiting: Annotated[int | None, tyro.conf.arg(help="robots that may wait; as --batch")] = None
    deadline_ms: Annotated[
        float | None,
        tyro.conf.arg(help="oldest observation that is answered; by default four full batches"),
    ] = None
    limits: Annotated[
        str | None,
        tyro.conf.arg(help="action limits as JSON file, or none; by default the statistics'"),
    ] = None
    limit_margin: Annotated[
        float, tyro.conf.arg(help="how far beyond the statistics, as a share of their range")
    ] = 0.25
    steps: Annotated[int | None, tyro.conf.arg(help="denoising steps; the policy's own")] = None
    threads: Annotated[int, tyro.conf.arg(help="threads of the policy")] = 1
    kernel: Annotated[str | None, tyro.conf.arg(help="integer kernel; the best by default")] = None
    seed: Annotated[int | None, tyro.conf.arg(help="of the noise; drawn by default")] = None
    drain_s: Annotated[float, tyro.conf.arg(help="seconds to finish in at the end")] = 3.0

    def run(self, screen: Screen) -> int:
        from omega_qvla.serving.service import Service, Settings, run_until_signal

        service = Service.build(
            self.directory,
            Settings(
                protocol=self.protocol,
                host=self.host,
                port=self.port,
                metrics_port=self.metrics_port,
                metrics_host=self.metrics_host,
                token_file=self.token_file,
                tls_certificate=self.tls_certificate,
                tls_key=self.tls_key,
                layout=self.layout,
                batch=self.batch,
                waiting=self.waiting,
                deadline_ms=self.deadline_ms,
                limits=self.limits,
                limit_margin=self.limit_margin,
                steps=self.steps,
                threads=self.threads,
                kernel=self.kernel,
                seed=self.seed,
                drain_s=self.drain_s,
            ),
            _log_line,
        )
        finished = run_until_signal(service)
        _write(self.json, {"schema": 1, **service.totals(), "drained": finished})
        if not finished:
            # A forward pass is still running, and nothing can interrupt it: leave without it.
            sys.stdout.flush()
            os._exit(0)
        return 0


def _log_line(event: str, **fields: Any) -> None:
    """One event, one line of JSON: what a log collector reads."""
    print(json.dumps({"time": time(), "event": event, **fields}), flush=True)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and exit with the documented status."""
    command = tyro.cli(
        Command,
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
        prog="omega-qvla",
        description=__doc__,
    )
    sys.exit(_run(command))


def _run(command: Any) -> int:
    try:
        return command.run(Screen())
    except OmegaError as error:
        status, message = error.exit_status, str(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; what was finished is kept, continue with --resume"
    except MemoryError:
        status, message = 3, "out of memory; use a machine with more, or a smaller policy"
    except OSError as error:
        status, message = 3, f"the system refused: {error}"
    if command.debug:
        traceback.print_exc()
    print(f"omega-qvla: {message}", file=sys.stderr)
    return status


def _console() -> Console:
    """A terminal as wide as it is; files and pipes get lines long enough for a table."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


@dataclass
class Screen:
    """Output: bars on a terminal, plain lines elsewhere."""

    console: Console = field(default_factory=_console)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def report(self, observations: Observations) -> None:
        """What was taken from a source of observations and what was left out."""
        for line in [] if observations.report is None else observations.report.lines():
            self.say(line)

    def table(self, content: TextTable, *, without: Sequence[str] = ()) -> None:
        """A table, less some columns, and its notes."""
        kept = [i for i, name in enumerate(content.header) if name not in without]
        table = Table(*(content.header[i] for i in kept))
        for row in content.rows:
            table.add_row(*(row[i] for i in kept))
        self.console.print(table)
        for note in content.notes:
            self.say(note)

    def memory(self, report: Mapping[str, Any], title: str) -> None:
        """The memory table of ``inspect``."""
        table = Table("component", "parameters", "bits each", "bytes", "16-bit bytes", title=title)
        for row in report["components"]:
            table.add_row(
                row["name"],
                f"{row['params']:,}",
                "–" if not row["params"] else f"{row['bits']:.2f}",
                human_bytes(row["bytes"]),
                human_bytes(row["reference_bytes"]),
            )
        table.add_section()
        whole = human_bytes(report["total_bytes"]), human_bytes(report["reference_bytes"])
        table.add_row("whole checkpoint", "", "", *whole)
        self.console.print(table)
        self.say(f"whole checkpoint {report['reduction']:.1%} smaller than in 16 bits")
        narrow = report["paper_scope_reduction"]
        if narrow is not None:
            self.say(f"the paper's count (linears of backbone and action head only): {narrow:.1%}")

    def bar(self, label: str, shares: Sequence[float] | None = None) -> _SingleBar:
        """A progress bar for one loop; ``shares``: of the work done before each of its items."""
        return _SingleBar(self, label, shares)

    def bars(self) -> _Bars:
        """Progress bars that appear as (label, done, total) reports come in."""
        return _Bars(self)


class _Bars(AbstractContextManager["_Bars"]):
    """Called with (label, done, total); a bar per label, or a line per tenth without a terminal."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[times]}"),
            console=screen.console,
            disable=not screen.console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._tenths: dict[str, int] = {}
        self._paces: dict[str, _Pace] = {}

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, label: str, done: int, total: int, share: float | None = None) -> None:
        """``share``: the part of the work that is done, where things differ in cost."""
        share = done / max(total, 1) if share is None else share
        times = self._paces.setdefault(label, _Pace()).text(share)
        if self._screen.console.is_terminal:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total, times=times)
            self._bars.update(self._tasks[label], completed=done, times=times)
            return
        tenth = 10 * done // max(total, 1)
        if tenth != self._tenths.get(label):
            self._tenths[label] = tenth
            self._screen.say(f"{label}: {done}/{total}{', ' if times else ''}{times}")


class _Pace:
    """What is left, judged by the last few reports: what was done before comes in all at once."""

    def __init__(self, clock: Callable[[], float] = monotonic, reports: int = 12) -> None:
        self._clock, self._begin = clock, clock()
        self._reports: deque[tuple[float, float]] = deque(maxlen=reports)

    def text(self, share: float) -> str:
        """Time used and left, as soon as that takes minutes; empty before."""
        now = self._clock()
        self._reports.append((now, share))
        (then, before), elapsed = self._reports[0], now - self._begin
        if elapsed < 60 or share <= before:
            return ""
        left = (now - then) * (1.0 - share) / (share - before)
        return f"{elapsed / 60:.0f} min elapsed, about {left / 60:.0f} min left"


class _SingleBar(AbstractContextManager[Callable[[int, int, str], None]]):
    def __init__(self, screen: Screen, label: str, shares: Sequence[float] | None) -> None:
        self._bars, self._label, self._shares = _Bars(screen), label, shares

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._bars.__enter__()
        return self._report

    def _report(self, done: int, total: int, _what: str) -> None:
        share = None if self._shares is None else self._shares[done]
        self._bars(self._label, done, total, share)

    def __exit__(self, *exit_info: object) -> None:
        self._bars.__exit__(*exit_info)


def _sweep(
    screen: Screen,
    rows: Sequence[SweepRow],
    options: _Simulation,
    open_loop: OpenLoop | None,
    tasks: Sequence[str] | None,
    source: str,
    policy_bytes: int,
    bars: Callable[[str, int, int], None] | None = None,
    journals: _Journals | None = None,
) -> dict[str, Any]:
    """Run a sweep; without a simulator, say what to install and run the open-loop part."""
    episodes: int = options.episodes  # type: ignore[attr-defined]
    if bars is None:
        with screen.bars() as own:
            return _sweep(
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
    placement = place_rows()
    if placement.notice:
        screen.say(placement.notice)
    run = partial(run_sweep, rows, open_loop=open_loop, progress=bars)
    if episodes == 0:
        return run(closed_loop=None, evaluate=placement.evaluate)
    try:
        with SimulatorPool(together) as pool:
            closed = ClosedLoop(pool, chosen, seeds, together=together)
            if journals is not None:
                closed = replace(closed, journals=journals.folder, identity=journals.identity)
            return run(closed_loop=closed, evaluate=placement.evaluate)
    except SimulatorUnavailable as error:
        if open_loop is None:
            raise
        screen.say(f"no closed loop: {error}")
        return run(closed_loop=None, evaluate=place_rows().evaluate)


@dataclass(frozen=True)
class _Journals:
    """Finished episodes of a comparison, and what they depend on."""

    folder: Path
    identity: Mapping[str, Any]

    def discard(self) -> None:
        """Start over."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()


def _policy_row(source: str, stress: float, choices: Choices) -> tuple[SweepRow, int]:
    """One row for ``eval``, a full-precision policy or an artifact, and its bytes in memory."""
    directory = Path(source)
    if (directory / "omega_config.json").exists():
        if stress:
            raise PolicyError(
                "the stress twin is made from a full-precision policy, before quantization; "
                f"{source} is an artifact"
            )
        artifact: Any = load(directory)
        resident = artifact.resident_bytes()
        row = SweepRow(
            source,
            FULL_PRECISION,
            lambda: artifact,
            footprint=lambda _: Footprint(directory_bytes(directory), resident),
            blueprint=artifact_blueprint(directory, artifact.content_hash),
        )
        return row, resident
    policy = load_policy(source, choices)
    size = _checkpoint_bytes(source)
    row = SweepRow(
        source,
        FULL_PRECISION,
        lambda: stress_twin(policy, stress),
        condition_name(stress),
        footprint=lambda built: full_footprint(built, size),
        blueprint=full_blueprint(
            source,
            choices,
            weights_fingerprint(policy),
            stress,
            seed=0,
            probe=None,
            checkpoint_bytes=size,
        ),
    )
    return row, _resident_bytes(policy)


def _identity_of(row: SweepRow) -> str:
    """What fixes the weights of a row of ``eval``: their fingerprint, or the artifact's hash."""
    assert row.blueprint is not None
    arguments = row.blueprint.arguments
    return str(arguments.get("weights") or arguments.get("content_hash"))


def _resident_bytes(policy: NativePolicy) -> int:
    return sum(parameter.nbytes for parameter in policy.module.parameters())


def _magnitudes(text: str) -> list[float]:
    """Plain and the stress conditions of ``--stress 10,30``."""
    try:
        given = [float(part) for part in _split(text) or ()]
    except ValueError:
        given = [-1.0]
    if any(not 0 <= magnitude < float("inf") for magnitude in given):
        raise RecipeError(f"--stress {text!r}: give magnitudes such as 30 or 10,30,100")
    return list(dict.fromkeys([0.0, *given]))


def _with_steps(policy: NativePolicy, steps: int | None) -> NativePolicy:
    return policy if steps is None else policy.with_steps(steps)


def _artifact_labels(directory: Path) -> dict[str, Any]:
    """What a row says of an artifact evaluated alone, with nothing to compare it to."""
    if not (directory / "omega_config.json").exists():
        return {}
    recipe = read_artifact(directory, verify=False).config["recipe"]
    return {"recipe": recipe["name"], "action_error": None, "smoothness": None}


def _inspection(
    memory: Mapping[str, Any], recipe: Mapping[str, Any], sites: Sequence[Any], kernel: str
) -> dict[str, Any]:
    return {"schema": 1, **memory, "recipe": recipe, "kernel": kernel, "sites": list(sites)}


def _covered_sites(policy: NativePolicy, recipe: Recipe) -> list[str]:
    return [
        site.name
        for stage in policy.stages()
        for site in stage.sites
        if recipe.scheme_of(site) is not None
    ]


def _measurement(threads: int) -> dict[str, Any]:
    """What every benchmark says of itself."""
    return {
        "schema": 1,
        "machine": machine_name(),
        "threads": threads,
        "torch": torch.__version__,
        "library": version("omega-qvla"),
    }


def _calibration(
    source: str, policy: NativePolicy, options: _Calibrated, limit: int
) -> Observations:
    """Observations by name; ``random:COUNT`` is noise in the shape the policy wants."""
    scheme, _, count = source.partition(":")
    if scheme != "random":
        return _observations(source, policy, options, limit=limit)
    if not count.isdecimal() or int(count) < 1:
        raise ObservationError(f"{source!r}: give a number of observations, as in random:8")
    config = policy.config
    return Observations.random(config.cameras, config.state_dim, count=int(count))


def _observations(
    source: str,
    policy: NativePolicy,
    options: _Calibrated,
    *,
    split: str = "calibration",
    limit: int = 64,
) -> Observations:
    """Observations from files; those of a LeRobot dataset under the policy's names."""
    if not is_dataset(Path(source)):
        if options.cameras or options.state or options.instruction:
            raise ObservationError(
                "--cameras, --state and --instruction are for LeRobot datasets, which "
                f"{source} is not"
            )
        return Observations.load(source, split=split)
    observations = Observations.from_lerobot(
        source,
        cameras=_camera_choice(options.cameras, policy.config.cameras),
        state=_split(options.state),
        instruction=options.instruction,
        split=split,
        limit=limit,
    )
    try:
        policy.initial_state(observations[0], torch.Generator())
    except ObservationError as error:
        raise ObservationError(
            f"the observations of {source} do not fit the policy: {error}. --state names the parts "
            f"the state is put together from, in order; there are {', '.join(state_names(source))}"
        ) from error
    return observations


def _camera_choice(text: str | None, cameras: Sequence[str]) -> dict[str, str | None]:
    """The policy's cameras → what the dataset calls them, from ``NAME=FEATURE,..``."""
    choice: dict[str, str | None] = {name: name for name in cameras}
    for pair in _split(text) or ():
        name, equals, feature = pair.partition("=")
        if not equals or name not in choice or not feature:
            raise ObservationError(
                f"--cameras {pair!r}: give POLICYNAME=FEATURE; the policy has {', '.join(cameras)}"
            )
        choice[name] = None if feature == "none" else feature
    return choice


def _default_calibration(policy: str) -> str:
    if policy.startswith("builtin:"):
        return policy
    raise PolicyError(
        f"{policy} brings no calibration data; give some with --calibration DATASET (a LeRobot "
        "dataset, or FILE.npz), or random:8 to measure speed and memory only"
    )


def _checkpoint_bytes(source: str) -> int | None:
    """Size of a local policy's weights, in one file or in shards."""
    scheme, _, name = source.partition(":")
    directory = builtin_directory(name) if scheme == "builtin" else Path(source)
    sizes = [path.stat().st_size for path in directory.glob("model*.safetensors")]
    return sum(sizes) if sizes else None


def _is_torch(directory: Path) -> bool:
    return read_artifact(directory, verify=False).config["policy"]["family"] == "torch"


def _require_cpu(device: str) -> None:
    if device != "cpu":
        raise ResourceError(
            f"device {device!r} is not supported by this command; use cpu. On a GPU an artifact "
            "is run from Python, load(DIR, device='cuda'), and measured by `make bench-gpu`"
        )


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _write(path: Path | None, document: Mapping[str, Any]) -> None:
    if path is not None:
        write_json(document, path)


if __name__ == "__main__":
    main()
