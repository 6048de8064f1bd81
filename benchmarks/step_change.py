"""Calibrated with 4 denoising steps, run with 8: the error against calibrating again.

Usage: ``python benchmarks/step_change.py --policy builtin:tiny-gr00t --json FILE``
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

import omega_qvla as oq
from omega_qvla.evaluation.step_change import measure_step_change
from omega_qvla.files import write_json
from omega_qvla.recipe import DEFAULT_RECIPE


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        policy: an embedded policy.
        calibrated: denoising steps of the calibration.
        steps: denoising steps when it runs.
        noises: per held-out observation.
        json: where the result goes.
    """

    policy: str = "builtin:tiny-gr00t"
    calibrated: int = 4
    steps: int = 8
    noises: int = 8
    json: Path | None = None


def main() -> None:
    """Measure and print."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    policy = oq.load_policy(options.policy)
    found = measure_step_change(
        policy,
        oq.Observations.load(options.policy, split="calibration"),
        list(oq.Observations.load(options.policy, split="heldout")),
        calibrated=options.calibrated,
        steps=options.steps,
        noises=options.noises,
    )
    document = {
        "schema": 1,
        "command": f"python benchmarks/step_change.py --policy {options.policy} --json FILE",
        "recipe": DEFAULT_RECIPE,
        "policy": options.policy,
        "machine": f"{platform.machine()}, {torch.__version__}",
        "noises": options.noises,
        **asdict(found),
        "ratio": found.ratio,
    }
    print(document)
    if options.json is not None:
        write_json(document, options.json)


if __name__ == "__main__":
    main()
