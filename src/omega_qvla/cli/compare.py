"""``compare``: recipes side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from omega_qvla.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    Calibrated,
    Checkpoint,
    Common,
    PolicyName,
    Positional,
    RecipeNames,
    ScopeName,
    Simulation,
    TaskNames,
    chosen_tasks,
    magnitudes,
    names_of,
    option,
    save,
)
from omega_qvla.extras import require
from omega_qvla.recipe import DEFAULT_RECIPE

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen
    from omega_qvla.evaluation.comparison import Observed
    from omega_qvla.policies.native import NativePolicy
    from omega_qvla.results.rows import Comparison

_LEFT_OUT = ("vs full precision", "noise floor", "resident")
"""Columns that are left to the JSON and the picture, so that the table fits a terminal."""
_NARROWS_LEFT_OUT, _WIDE = ("jerk ratio", "ms/chunk"), 100
"""What a terminal of fewer columns has to do without as well."""


@dataclass(frozen=True)
class Compare(Simulation, Calibrated, Checkpoint, Common):
    """Compare recipes on one policy, open loop and in the simulator, on the same seeds."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla compare builtin:tiny-pi05 --recipes rtn,gptq,omega-w4a4 --episodes 0",
        "omega-qvla compare DIR --calibration DATASET --episodes 0 --held-out 32",
        "omega-qvla compare builtin:tiny-pi05 --stress 10,30 --out out/stress",
    )
    policy: Positional[PolicyName] = tyro.MISSING
    recipes: RecipeNames = f"rtn,omega-paper,{DEFAULT_RECIPE}"
    episodes: Annotated[
        int, option(metavar="N", help="per task; 0: open loop only"), COUNT_OR_NONE
    ] = 20
    stress: Annotated[
        str,
        option(
            metavar="MAGNITUDE,..", help="conditions with injected outliers, such as 10,30; 0: none"
        ),
    ] = "0"
    scope: ScopeName = "all"
    tasks: TaskNames = None
    held_out: Annotated[
        int | None,
        option(metavar="N", help="held-out observations of the action error; all by default"),
        COUNT,
    ] = None
    noises: Annotated[int, option(metavar="N", help="of each held-out observation"), COUNT] = 8
    reference: Annotated[
        Literal["each", "once"],
        option(help="full precision in each condition, or once: outliers do not change it"),
    ] = "each"
    out: Annotated[Path, option(metavar="DIR", help="artifacts, picture and JSON go here")] = Path(
        "out/compare"
    )
    resume: Annotated[
        bool, option(help="keep finished episodes, and artifacts made from the same")
    ] = False

    def run(self, screen: Screen, command: str = "compare") -> int:
        require("the picture of a comparison", "report", "matplotlib")
        from omega_qvla.evaluation.comparison_folder import RESULTS
        from omega_qvla.report.figure import comparison_figure
        from omega_qvla.report.summary import sentence_of
        from omega_qvla.report.table import results_table, task_table

        rows, target = self.measure(screen, command).rows, self.out / RESULTS
        narrow = screen.console.width < _WIDE
        screen.table(
            results_table(rows), without=(*_LEFT_OUT, *(_NARROWS_LEFT_OUT if narrow else ()))
        )
        if rows[0].success:
            screen.table(task_table(rows))
        picture = comparison_figure(rows, self.out / "comparison.png")
        screen.say(f"\n{sentence_of(rows, preferred=DEFAULT_RECIPE)}")
        screen.say(f"results {target}\npicture {picture}")
        screen.say(f"a page of it: omega-qvla report {target}")
        return 0

    def kept(self) -> str | None:
        from omega_qvla.evaluation.comparison_folder import MADE_BY

        begun = (self.out / MADE_BY).exists()
        return f"finished episodes and artifacts are kept in {self.out}" if begun else None

    def measure(self, screen: Screen, command: str) -> Comparison:
        """The comparison's document, which is in ``results.json`` then.

        Args:
            command: what the user typed.
        """
        from omega_qvla.evaluation.closed_loop import Episodes
        from omega_qvla.evaluation.comparison import compare

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
        from omega_qvla.cli.sources import observations_of
        from omega_qvla.evaluation.subjects import admit, default_calibration

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
