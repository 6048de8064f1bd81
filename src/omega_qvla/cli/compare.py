"""``compare``: recipes side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omega_qvla.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    Calibrated,
    Checkpoint,
    Common,
    Positional,
    Simulation,
    chosen_tasks,
    magnitudes,
    names_of,
    save,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.cli.sources import observations_of
from omega_qvla.evaluation.closed_loop import Episodes
from omega_qvla.evaluation.comparison import RECIPES, Observed, compare
from omega_qvla.evaluation.comparison_folder import MADE_BY, RESULTS
from omega_qvla.evaluation.openloop import NOISES
from omega_qvla.evaluation.subjects import admit, default_calibration
from omega_qvla.extras import require
from omega_qvla.policies.native import NativePolicy
from omega_qvla.recipe import Scope
from omega_qvla.report.figure import comparison_figure
from omega_qvla.report.table import results_table, task_table
from omega_qvla.results.rows import Comparison

_WIDE_COLUMNS = ("vs full precision", "noise floor", "resident")
"""Columns that are left to the JSON and the picture, so that the table fits a terminal."""


@dataclass(frozen=True)
class Compare(Simulation, Calibrated, Checkpoint, Common):
    """Compare recipes on one policy, open loop and in the simulator, on the same seeds."""

    policy: Positional[str] = tyro.MISSING
    recipes: Annotated[
        str, tyro.conf.arg(help="comma-separated names or YAML files; or: methods, ablations")
    ] = ",".join(RECIPES)
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
        tyro.conf.arg(help="full precision in each condition, or once: outliers do not change it"),
    ] = "each"
    out: Annotated[Path, tyro.conf.arg(help="artifacts, picture and JSON go here")] = Path(
        "out/compare"
    )
    resume: Annotated[
        bool, tyro.conf.arg(help="keep finished episodes, and artifacts made from the same")
    ] = False

    def run(self, screen: Screen, command: str = "compare") -> int:
        require("the picture of a comparison", "report", "matplotlib")
        rows, target = self.measure(screen, command).rows, self.out / RESULTS
        screen.table(results_table(rows), without=_WIDE_COLUMNS)
        if rows[0].success:
            screen.table(task_table(rows))
        picture = comparison_figure(rows, self.out / "comparison.png")
        screen.say(f"\nresults {target}\npicture {picture}")
        return 0

    def kept(self) -> str | None:
        begun = (self.out / MADE_BY).exists()
        return f"finished episodes and artifacts are kept in {self.out}" if begun else None

    def measure(self, screen: Screen, command: str) -> Comparison:
        """The comparison's document, which is in ``results.json`` then.

        Args:
            command: what the user typed.
        """
        with screen.bars() as bars:
            document = compare(
                self.policy,
                names_of(self.recipes) or (),
                observations=partial(self._observations, screen),
                episodes=Episodes(self.episodes, chosen_tasks(self.tasks), self.seed),
                stress=magnitudes(self.stress),
                scope=self.scope,
                held_out=self.held_out,
                noises=self.noises,
                reference=self.reference,
                out=self.out,
                resume=self.resume,
                overwrite=self.overwrite,
                choices=self.choices,
                resources=self.resources,
                command=command,
                say=screen.say,
                progress=bars,
            )
        save(self.json, document.to_json())
        return document

    def _observations(self, screen: Screen, policy: NativePolicy) -> Observed:
        source = self.calibration or default_calibration(self.policy)
        calibration = observations_of(source, policy, self)
        held = observations_of(source, policy, self, split="heldout")
        found = calibration, held if self.held_out is None else held.spread(self.held_out)
        for observations in found:
            screen.report(observations)
            admit(
                policy,
                observations,
                len(observations),
                allow=self.allow_mismatch,
                say=screen.say,
            )
        return found
