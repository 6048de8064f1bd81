"""``backbone``: recipes on a language model with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from omega_qvla.cli.options import Common, RecipeNames, Threads, names_of, option, save
from omega_qvla.recipe import Recipe

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen


@dataclass(frozen=True)
class Backbone(Common):
    """Quantize SmolLM2-135M with each recipe and measure how its next-token distributions move."""

    examples: ClassVar[tuple[str, ...]] = ("omega-qvla backbone --recipes rtn,omega-w4a4",)
    recipes: RecipeNames = "methods"
    split: Annotated[
        Literal["test", "selection"],
        option(help="the text measured on; selection is for choosing recipes"),
    ] = "test"
    threads: Threads = None

    def run(self, screen: Screen) -> int:
        from omega_qvla.evaluation.backbone.measure import measure_backbone
        from omega_qvla.evaluation.backbone.model import smollm2
        from omega_qvla.evaluation.backbone.text import chunks
        from omega_qvla.evaluation.benchmark import expand_recipes
        from omega_qvla.evaluation.speed.kernel_speed import machine_name
        from omega_qvla.report.backbone_table import backbone_table
        from omega_qvla.threads import chosen_threads, torch_threads

        recipes = [Recipe.load(name) for name in expand_recipes(names_of(self.recipes) or ())]
        policy, file = smollm2()
        command = f"omega-qvla backbone --recipes {self.recipes}"
        if self.split != "test":
            command += f" --split {self.split}"
        threads = chosen_threads(policy.module, self.threads)
        with torch_threads(threads), screen.bars() as bars:
            document = measure_backbone(
                policy,
                recipes,
                chunks(file, "calibration"),
                chunks(file, self.split),
                split=self.split,
                progress=bars,
                machine=machine_name(),
                command=command,
            )
        save(self.json, document.to_json())
        screen.table(backbone_table(document))
        return 0
