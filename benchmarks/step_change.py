"""Calibrated with 4 denoising steps, run with 8: the error against calibrating again.

A static activation scale belongs to a flow time, and times between the calibrated ones are
interpolated.  The alternative is to calibrate again for the new number of steps.  Both are compared
with full precision *at the new number of steps*, on the same observations and noises: the error
that changing the number adds is what the first has more than the second.

Usage: ``python benchmarks/step_change.py --policy builtin:tiny-gr00t --json FILE``
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import omega_qvla as oq
from omega_qvla.evaluation.openloop import NOISES, Array, draw_noises, relative_error
from omega_qvla.files import write_json
from omega_qvla.policies.native import NativePolicy
from omega_qvla.recipe import DEFAULT_RECIPE, Recipe


@dataclass(frozen=True)
class StepChange:
    """Relative error of the action chunk (``openloop.py``) with ``steps`` denoising steps.

    Attributes:
        calibrated: the steps it was calibrated with.
        steps: the steps it ran with.
        changed: error of the policy calibrated with the former.
        recalibrated: error of one calibrated with the latter.
        unchanged: error of the former with its own number of steps.
    """

    calibrated: int
    steps: int
    changed: float
    recalibrated: float
    unchanged: float

    @property
    def ratio(self) -> float:
        """How many times the error of calibrating again."""
        return self.changed / self.recalibrated


def measure_step_change(
    policy: NativePolicy,
    calibration: Any,
    held_out: Sequence[Any],
    recipe: str | Recipe = DEFAULT_RECIPE,
    *,
    calibrated: int,
    steps: int,
    noises: int = NOISES,
    seed: int = 0,
) -> StepChange:
    """Quantize for either number of steps, and run both with ``steps``.

    Args:
        policy: full precision.
        calibration, held_out: observations.
        noises: per held-out observation; the error is heavy-tailed (docs/benchmark.md).
    """
    before, after = policy.with_steps(calibrated), policy.with_steps(steps)
    ours, again = (oq.quantize(each, calibration, recipe) for each in (before, after))
    drawn = draw_noises(policy, (len(held_out), noises), seed)

    def chunks(sampler: Any, count: int) -> Array:
        pairs = zip(held_out, drawn, strict=True)
        found = [sampler.sample_noises(item, noise, steps=count) for item, noise in pairs]
        return np.stack([np.asarray(chunk, dtype=np.float64) for chunk in found])

    reference = chunks(policy, steps)
    return StepChange(
        calibrated=calibrated,
        steps=steps,
        changed=relative_error(chunks(ours, steps), reference),
        recalibrated=relative_error(chunks(again, steps), reference),
        unchanged=relative_error(chunks(ours, calibrated), chunks(policy, calibrated)),
    )


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
