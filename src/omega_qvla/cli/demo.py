"""``demo``: the main job on the embedded policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from omega_qvla.cli.compare import Compare
from omega_qvla.cli.options import (
    COUNT_OR_NONE,
    Common,
    Simulation,
    option,
)
from omega_qvla.recipe import DEFAULT_RECIPE

if TYPE_CHECKING:
    from omega_qvla.cli.screen import Screen

NOISES = 2
"""Of each held-out observation, so that a demonstration takes minutes."""


@dataclass(frozen=True)
class Demo(Simulation, Common):
    """The main job on the embedded policy: quantize, save, reload, run the robot, compare."""

    examples: ClassVar[tuple[str, ...]] = (
        "omega-qvla demo",
        "omega-qvla demo --episodes 0 --out out/open-loop",
        "omega-qvla demo --policy tiny-gr00t --out out/gr00t",
    )
    policy: Annotated[Literal["tiny-pi05", "tiny-gr00t"], option(help="embedded policy")] = (
        "tiny-pi05"
    )
    episodes: Annotated[
        int,
        option(metavar="N", help="episodes per task, method and condition; 0: open loop only"),
        COUNT_OR_NONE,
    ] = 4
    out: Annotated[
        Path, option(metavar="DIR", help="artifacts, table, picture and JSON go here")
    ] = Path("out/demo")

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
        screen.say(f"the W4A4 policy is in {artifact}")
        screen.say(f"look into it: omega-qvla inspect {artifact}")
        return status
