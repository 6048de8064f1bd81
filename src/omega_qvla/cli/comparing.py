"""``demo`` and ``compare``: recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from omega_qvla.claims import Claim
from omega_qvla.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    Calibrated,
    Checkpoint,
    Common,
    Positional,
    Simulation,
    magnitudes,
    names_of,
    save,
)
from omega_qvla.cli.outputs import MADE_BY, RESULTS, require_free_comparison, sign
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sources import (
    admit,
    checkpoint_bytes,
    default_calibration,
    observations_of,
    resident_bytes,
)
from omega_qvla.cli.sweeps import (
    Journals,
    chosen_tasks,
    closed_loop_possible,
    require_cluster,
    sweep,
)
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.comparison import (
    FULL_PRECISION,
    Comparison,
    comparison_rows,
    discard_simulations,
)
from omega_qvla.evaluation.openloop import NOISES
from omega_qvla.evaluation.sweep import OpenLoop
from omega_qvla.evaluation.twin import condition_name
from omega_qvla.extras import require
from omega_qvla.files import write_json
from omega_qvla.policies.loading import load_policy
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe, Scope
from omega_qvla.report.figure import comparison_figure
from omega_qvla.report.table import comparison_table, task_table

_WIDE_COLUMNS = ("vs full precision", "noise floor", "resident")
"""Columns that are left to the JSON and the picture, so that the table fits a terminal."""

DEMO_NOISES = 2
DEMO_RECIPES = f"rtn,omega-paper,{DEFAULT_RECIPE}"


@dataclass(frozen=True)
class Compare(Simulation, Calibrated, Checkpoint, Common):
    """Compare recipes on one policy, open loop and in the simulator, on the same seeds."""

    policy: Positional[str] = tyro.MISSING
    recipes: Annotated[
        str, tyro.conf.arg(help="comma-separated names or YAML files; or: methods, ablations")
    ] = DEMO_RECIPES
    episodes: Annotated[int, tyro.conf.arg(help="per task; 0: open loop only"), COUNT_OR_NONE] = 20
    stress: Annotated[
        str, tyro.conf.arg(help="add stress conditions: magnitudes, comma-separated; 0: none")
    ] = "0"
    scope: Annotated[Scope, tyro.conf.arg(help="everything, or the paper's part")] = "all"
    tasks: Annotated[str | None, tyro.conf.arg(help="comma-separated; default: admitted")] = None
    held_out: Annotated[
        int | None,
        tyro.conf.arg(help="held-out observations of the action error; all by default"),
        COUNT,
    ] = None
    noises: Annotated[int, tyro.conf.arg(help="of each held-out observation"), COUNT] = NOISES
    reference: Annotated[
        Literal["each", "once"],
        tyro.conf.arg(help="full precision in each condition, or once: its twins compute the same"),
    ] = "each"
    out: Annotated[Path, tyro.conf.arg(help="artifacts, picture and JSON go here")] = Path(
        "out/compare"
    )
    resume: Annotated[
        bool, tyro.conf.arg(help="keep finished episodes, and artifacts made from the same")
    ] = False

    def run(self, screen: Screen, command: str = "compare") -> int:
        require("the picture of a comparison", "report", "matplotlib")
        document, target = self.measure(screen, command), self.out / RESULTS
        screen.table(comparison_table(target), without=_WIDE_COLUMNS)
        if document["rows"][0]["success"]:
            screen.table(task_table(target))
        picture = comparison_figure(target, self.out / "comparison.png")
        screen.say(f"\nresults {target}\npicture {picture}")
        return 0

    def kept(self) -> str | None:
        begun = (self.out / MADE_BY).exists()
        return f"finished episodes and artifacts are kept in {self.out}" if begun else None

    def require_free(self, command: str) -> None:
        """Refuse an output folder whose content would be lost.

        Args:
            command: what writes it.

        Raises:
            OutputError: names what is there.
        """
        recipes = [Recipe.load(name).name for name in expand_recipes(names_of(self.recipes) or ())]
        cells = [
            (self.policy, recipe, condition_name(magnitude), self.scope)
            for magnitude in magnitudes(self.stress)
            for recipe in (FULL_PRECISION, *recipes)
        ]
        require_free_comparison(
            self.out, cells, command, resume=self.resume, overwrite=self.overwrite
        )

    def measure(self, screen: Screen, command: str) -> dict[str, Any]:
        """The comparison's document, which is in ``results.json`` then.

        Args:
            command: what the user typed.
        """
        require_cluster(self)
        tasks = chosen_tasks(self.tasks)
        with Claim(self.out):
            self.require_free(command)
            simulated = closed_loop_possible(screen, self.episodes)
            options = self if simulated else replace(self, episodes=0)
            return options._measured(screen, command, tasks)

    def _measured(
        self, screen: Screen, command: str, tasks: Sequence[str] | None
    ) -> dict[str, Any]:
        torch.set_num_threads(self.threads)
        policy = load_policy(self.policy, self.choices)
        source = self.calibration or default_calibration(self.policy)
        comparison = Comparison(
            label=self.policy,
            policy=policy,
            choices=self.choices,
            weights=weights_fingerprint(policy),
            checkpoint_bytes=checkpoint_bytes(self.policy),
            calibration=observations_of(source, policy, self),
            recipes=names_of(self.recipes) or (),
            magnitudes=magnitudes(self.stress),
            scope=self.scope,
            artifacts=self.out / "artifacts",
            reference=self.reference,
            resume=self.resume,
        )
        held_out = observations_of(source, policy, self, split="heldout")
        if self.held_out is not None:
            held_out = held_out.spread(self.held_out)
        for observations in (comparison.calibration, held_out):
            screen.report(observations)
            admit(policy, observations, len(observations), self, screen)
        journals = Journals(
            self.out / "journals",
            {
                "weights": comparison.weights,
                "calibration": comparison.calibration.fingerprint,
            },
        )
        sign(self.out, command)
        if not self.resume:
            journals.discard()
        with screen.bars() as bars:
            rows = comparison_rows(comparison, bars)
            document = sweep(
                screen,
                rows,
                self,
                OpenLoop(held_out, noises=self.noises),
                tasks,
                self.policy,
                resident_bytes(policy),
                bars,
                journals,
            )
        discard_simulations(comparison)
        write_json(document, self.out / RESULTS)
        save(self.json, document)
        return document


@dataclass(frozen=True)
class Demo(Simulation, Common):
    """The main job on the embedded policy: quantize, save, reload, run the robot, compare."""

    policy: Annotated[Literal["tiny-pi05", "tiny-gr00t"], tyro.conf.arg(help="embedded policy")] = (
        "tiny-pi05"
    )
    episodes: Annotated[
        int, tyro.conf.arg(help="episodes per task, method and condition"), COUNT_OR_NONE
    ] = 4
    out: Annotated[Path, tyro.conf.arg(help="artifacts, table, picture and JSON go here")] = Path(
        "out/demo"
    )

    def run(self, screen: Screen) -> int:
        command = Compare(
            policy=f"builtin:{self.policy}",
            recipes=DEMO_RECIPES,
            episodes=self.episodes,
            stress="30",
            noises=DEMO_NOISES,
            out=self.out,
            json=self.json,
            overwrite=self.overwrite,
            debug=self.debug,
            workers=self.workers,
            threads=self.threads,
            seed=self.seed,
            processes=self.processes,
            ray=self.ray,
        )
        status = command.run(screen, "demo")
        artifact = self.out / "artifacts" / f"{DEFAULT_RECIPE}-plain"
        screen.say(f"\nthe W4A4 policy is in {artifact}")
        screen.say(f"look into it: omega-qvla inspect {artifact}")
        return status
