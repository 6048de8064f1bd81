"""``demo``: the main job on the embedded policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omega_qvla.cli.compare import Compare
from omega_qvla.cli.options import (
    COUNT_OR_NONE,
    Common,
    Simulation,
)
from omega_qvla.cli.screen import Screen
from omega_qvla.recipe import DEFAULT_RECIPE

NOISES = 2
"""Of each held-out observation, so that a demonstration takes minutes."""


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
            episodes=self.episodes,
            stress="30",
            noises=NOISES,
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
