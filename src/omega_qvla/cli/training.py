"""``train``: the embedded policies from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omega_qvla.cli.options import Common, Positional, save
from omega_qvla.cli.screen import Screen
from omega_qvla.threads import torch_threads
from omega_qvla.training.embedded import rebuild


@dataclass(frozen=True)
class Train(Common):
    """Rebuild an embedded policy from scratch: demonstrations, training, admission."""

    policy: Positional[Literal["tiny-pi05", "tiny-gr00t"]] = "tiny-pi05"
    out: Annotated[Path | None, tyro.conf.arg(help="the policy directory; out/POLICY")] = None
    steps: Annotated[int | None, tyro.conf.arg(help="optimizer steps; the recipe's own")] = None
    workers: Annotated[int, tyro.conf.arg(help="simulator processes")] = 2
    threads: Annotated[int, tyro.conf.arg(help="threads of the training")] = 2

    def run(self, screen: Screen) -> int:
        out = self.out or Path("out") / self.policy
        with screen.bars() as bars, torch_threads(self.threads):
            provenance = rebuild(
                self.policy, out, steps=self.steps, workers=self.workers, progress=bars
            )
        save(self.json, provenance)
        screen.say(f"policy in {out}; admitted: {', '.join(provenance['admitted'])}")
        return 0
