"""``recipes``: the methods there are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from omega_qvla.cli.options import Common, option, save
from omega_qvla.recipe import COMPONENTS, DEFAULT_RECIPE, Recipe, ablation_names, recipe_names

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen
    from omega_qvla.results.summaries import RecipeLine

_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


@dataclass(frozen=True)
class Recipes(Common):
    """List the recipes: name, bits, whether its integers exist, paper, one line."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla recipes",
        "omega-qvla recipes --ablations --json out/recipes.json",
    )
    ablations: Annotated[
        bool, option(help="also the variations that show what each part of a method does")
    ] = False

    def run(self, screen: Screen) -> int:
        from omega_qvla.report.table import MISSING, Table
        from omega_qvla.results.summaries import RecipeList

        names = [*recipe_names(), *(ablation_names() if self.ablations else ())]
        found = RecipeList(recipes=[_line(Recipe.load(name)) for name in names])
        rows = [
            (
                one.name + (" (default)" if one.default else ""),
                one.bits,
                "yes" if one.realizable else "simulated",
                one.paper or MISSING,
                one.description,
            )
            for one in found.recipes
        ]
        header = ("name", "bits", "integers", "arXiv", "what it is")
        note = "omega-qvla quantize POLICY --recipe NAME; a YAML file of your own works as well"
        screen.table(Table(header, tuple(rows), (note,)))
        save(self.json, found.to_json())
        return 0


def _line(recipe: Recipe) -> RecipeLine:
    from omega_qvla.results.summaries import RecipeLine

    schemes = [scheme for part in COMPONENTS if (scheme := recipe.scheme(part)) is not None]
    bits = dict.fromkeys(f"W{one.weights.bits}A{one.activations.bits}" for one in schemes)
    paper = _PAPER.search(recipe.description)
    return RecipeLine(
        name=recipe.name,
        description=recipe.description,
        bits=", ".join(bits),
        left_in_16_bits=list(recipe.left_in_16_bits),
        realizable=recipe.realizable,
        paper=None if paper is None else paper[1],
        default=recipe.name == DEFAULT_RECIPE,
    )
