"""``unseen``: recipes calibrated on less than they meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from omega_qvla.cli.options import (
    COUNT,
    Common,
    PolicyName,
    Positional,
    RecipeNames,
    Threads,
    names_of,
    option,
    save,
)
from omega_qvla.files import write_json
from omega_qvla.recipe import Recipe

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen

_HELD_OUT = 48  # the definition's


@dataclass(frozen=True)
class Unseen(Common):
    """Calibrate on two of the tasks, one observation, a black image; measure the action error."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla unseen builtin:tiny-gr00t --recipes rtn,omega-w4a4",
    )
    policy: Positional[PolicyName] = "builtin:tiny-pi05"
    recipes: RecipeNames = "methods"
    out: Annotated[
        Path, option(metavar="DIR", help="the JSON goes here, and what is done until then")
    ] = Path("out/unseen")
    calibration: Annotated[
        str | None,
        option(
            metavar="FILE",
            help="npz file of observations with their tasks; the policy's own by default",
        ),
    ] = None
    held_out: Annotated[
        int, option(metavar="N", help="held-out observations, evenly spread"), COUNT
    ] = _HELD_OUT
    resume: Annotated[bool, option(help="keep what was measured of the same")] = False
    threads: Threads = None

    def run(self, screen: Screen) -> int:
        from omega_qvla.calibration.observations import Observations
        from omega_qvla.evaluation.benchmark import expand_recipes
        from omega_qvla.evaluation.speed.kernel_speed import machine_name
        from omega_qvla.evaluation.subjects import default_calibration
        from omega_qvla.evaluation.unseen import Unseen as Definition
        from omega_qvla.evaluation.unseen import measure_unseen
        from omega_qvla.policies.full_precision import load_policy
        from omega_qvla.quantization.pipeline import weights_fingerprint
        from omega_qvla.report.benchmark_table import unseen_table
        from omega_qvla.threads import chosen_threads, torch_threads

        recipes = [Recipe.load(name) for name in expand_recipes(names_of(self.recipes) or ())]
        policy = load_policy(self.policy)
        source = self.calibration or default_calibration(self.policy)
        name = self.policy.rpartition(":")[2].rpartition("/")[2]
        command = f"omega-qvla unseen {self.policy} --recipes {self.recipes}"
        if self.calibration is not None:
            command += f" --calibration {self.calibration}"
        if self.held_out != _HELD_OUT:
            command += f" --held-out {self.held_out}"
        threads = chosen_threads(policy.module, self.threads)
        with screen.bars() as bars, torch_threads(threads):
            document = measure_unseen(
                policy,
                self.policy,
                recipes,
                Observations.load(source),
                Observations.load(source, split="heldout"),
                definition=Definition(heldout=self.held_out),
                weights=weights_fingerprint(policy),
                partial=self.out / f".{name}-partial.json",
                resume=self.resume,
                progress=bars,
                machine=machine_name(),
                command=command,
            )
        target = self.out / f"{name}-unseen.json"
        write_json(document.to_json(), target)
        save(self.json, document.to_json())
        screen.table(unseen_table(document.rows))
        screen.say(f"\nresults {target}")
        return 0
