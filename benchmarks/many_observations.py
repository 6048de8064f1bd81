"""More held-out observations than a policy brings, out of its own episodes.

    python benchmarks/many_observations.py --policy builtin:tiny-pi05 --out many.npz
    omega-qvla compare builtin:tiny-pi05 --calibration many.npz --episodes 0 --noises 2 \\
        --recipes methods --stress 10,30,100 --reference once --json FILE

The action error is heavy-tailed: a few observations at which full precision is undecided make up
half of it, so over the 96 that the benchmark has frozen, few differences between methods
are significant.  Here
full precision acts in the simulator, with seeds that neither training nor the benchmark uses, and
every observation it acted on is held out.  What methods are calibrated on stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import omega_qvla as oq
from omega_qvla.evaluation.benchmark import benchmark_tasks
from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv


@dataclass(frozen=True)
class Options:
    """What is collected.

    Attributes:
        out: the observations go here, with those for calibration beside them.
        policy: an embedded policy.
        episodes: of each task.
        every: which of the observations it acted on are kept: all of them with 1.
        first_seed: of the episodes; training and the benchmark use none from 500,000 on.
    """

    out: Path
    policy: str = "builtin:tiny-pi05"
    episodes: int = 50
    every: int = 2
    first_seed: int = 500_000


def main() -> None:
    """Act, and write what was seen."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    policy = oq.load_policy(options.policy)
    kept = [
        {**item, "split": "calibration"}
        for item in oq.Observations.load(options.policy, split="calibration")
    ]
    fixed = len(kept)
    for task in benchmark_tasks(options.policy):
        seen = oq.Observations.from_rollouts(
            policy,
            MetaWorldEnv(task),
            episodes=options.episodes,
            every=options.every,
            seed=options.first_seed,
        )
        kept += [{**item, "task": task, "split": "heldout"} for item in seen]
        print(f"{task}: {len(seen)} observations", flush=True)
    oq.Observations(kept).save_npz(options.out)
    print(f"{len(kept) - fixed} held-out observations written to {options.out}")


if __name__ == "__main__":
    main()
