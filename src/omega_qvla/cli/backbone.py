"""``backbone``: recipes on a language model with real weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from omega_qvla.cli.options import PROCESSES, Common, names_of, save
from omega_qvla.cli.screen import Screen
from omega_qvla.evaluation.backbone.measure import measure_backbone
from omega_qvla.evaluation.backbone.model import smollm2
from omega_qvla.evaluation.backbone.text import chunks
from omega_qvla.evaluation.benchmark import expand_recipes
from omega_qvla.evaluation.speed.kernel_speed import machine_name
from omega_qvla.recipe import Recipe
from omega_qvla.report.backbone_table import backbone_table


@dataclass(frozen=True)
class Backbone(Common):
    """Quantize SmolLM2-135M with each recipe and measure how its next-token distributions move."""

    recipes: Annotated[
        str, tyro.conf.arg(help="comma-separated names or YAML files; or: methods, ablations")
    ] = "methods"
    split: Annotated[
        Literal["test", "selection"],
        tyro.conf.arg(help="the text measured on; selection is for choosing recipes"),
    ] = "test"
    threads: Annotated[int, tyro.conf.arg(help="threads of the model"), PROCESSES] = 1

    def run(self, screen: Screen) -> int:
        torch.set_num_threads(self.threads)
        recipes = [Recipe.load(name) for name in expand_recipes(names_of(self.recipes) or ())]
        policy, file = smollm2()
        command = f"omega-qvla backbone --recipes {self.recipes}"
        if self.split != "test":
            command += f" --split {self.split}"
        with screen.bars() as bars:
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
