"""``diagnose``: what quantization does to a policy, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from omega_qvla.cli.options import (
    COUNT,
    COUNT_OR_NONE,
    EVALUATION_SEED,
    MAGNITUDE,
    Calibrated,
    Checkpoint,
    Common,
    PolicyName,
    Positional,
    RecipeName,
    ScopeName,
    Seed,
    TaskNames,
    Threads,
    chosen_tasks,
    option,
    save,
)
from omega_qvla.errors import SimulatorUnavailable
from omega_qvla.files import write_json
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Bars, Screen
    from omega_qvla.policies.native import NativePolicy

FILM_SIZE = 112
"""Width and height in pixels of a film's pictures; the policy's own are smaller."""


@dataclass(frozen=True)
class Diagnose(Calibrated, Checkpoint, Common):
    """Look inside a quantized policy: every site's error and range, and the robot's path."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla diagnose builtin:tiny-pi05 --recipe rtn --stress 30 --episodes 0",
        "omega-qvla diagnose DIR --calibration DATASET --episodes 0 --out out/mine.json",
    )
    policy: Positional[PolicyName] = tyro.MISSING
    recipe: RecipeName = DEFAULT_RECIPE
    scope: ScopeName = "all"
    stress: Annotated[
        float, option(metavar="MAGNITUDE", help="of injected outliers; 0: none"), MAGNITUDE
    ] = 0.0
    observations: Annotated[
        int, option(metavar="N", help="held-out observations to look at"), COUNT
    ] = 16
    episodes: Annotated[
        int, option(metavar="N", help="per task and policy; 0: none"), COUNT_OR_NONE
    ] = 1
    tasks: TaskNames = None
    seed: Seed = EVALUATION_SEED
    threads: Threads = None
    out: Annotated[Path, option(metavar="FILE", help="the JSON, an input of `report`")] = Path(
        "out/diagnostics.json"
    )

    @property
    def files(self) -> list[Path]:
        return [*super().files, self.out]

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.closed_loop import simulated
        from omega_qvla.policies.full_precision import load_policy
        from omega_qvla.threads import chosen_threads, torch_threads

        tasks = chosen_tasks(self.tasks)
        episodes = simulated(self.episodes, screen.say)
        recipe = Recipe.load(self.recipe).scoped(self.scope)
        policy = load_policy(self.policy, self.choices)
        with torch_threads(chosen_threads(policy.module, self.threads)):
            return self._diagnose(screen, policy, recipe, tasks, episodes)

    def _diagnose(
        self,
        screen: Screen,
        policy: NativePolicy,
        recipe: Recipe,
        tasks: Sequence[str] | None,
        episodes: int,
    ) -> int:
        from omega_qvla.api import quantize
        from omega_qvla.cli.sources import observations_of
        from omega_qvla.evaluation.diagnostics import diagnose
        from omega_qvla.evaluation.outlier_injection import condition_name, outlier_injected
        from omega_qvla.evaluation.subjects import admit, default_calibration
        from omega_qvla.report.table import site_table
        from omega_qvla.results.diagnostics import Diagnostics

        source = self.calibration or default_calibration(self.policy)
        calibration = observations_of(source, policy, self)
        held_out = observations_of(source, policy, self, split="heldout")
        for observations in (calibration, held_out):
            admit(
                policy,
                observations,
                len(observations),
                allow=self.allow_mismatch,
                say=screen.say,
            )
        full = outlier_injected(policy, self.stress, probe=calibration[0])
        with screen.bars() as bars:
            quantized = quantize(
                full,
                calibration,
                recipe,
                progress=lambda done, total, _: bars(f"quantizing with {recipe.name}", done, total),
                allow_mismatch=self.allow_mismatch,
            )
            content = {
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
                "rollouts": None
                if not episodes
                else self._rollouts(screen, {"fp32": full, recipe.name: quantized}, tasks, bars),
            }
        found = Diagnostics.model_validate(content)
        write_json(found.to_json(), self.out)
        save(self.json, found.to_json())
        screen.table(site_table(found))
        screen.say(f"\ndiagnostics {self.out}; make them visible: omega-qvla report {self.out}")
        return 0

    def _rollouts(
        self,
        screen: Screen,
        policies: Mapping[str, Any],
        tasks: Sequence[str] | None,
        bars: Bars,
    ) -> dict[str, Any] | None:
        """The episodes; where the simulator cannot start, say why and go on without."""
        from omega_qvla.evaluation.benchmark import benchmark_tasks
        from omega_qvla.evaluation.simulators.metaworld_tasks import METAWORLD
        from omega_qvla.evaluation.trajectories import compare_tracks

        try:
            return compare_tracks(
                policies,
                tasks or benchmark_tasks(self.policy),
                range(self.seed, self.seed + self.episodes),
                environment=METAWORLD,
                replay_options={"image_size": FILM_SIZE},
                progress=partial(bars, "episodes"),
            )
        except SimulatorUnavailable as error:
            screen.say(f"no episodes: {error}")
            return None
