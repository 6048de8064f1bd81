"""From demonstrations on disk to a policy directory: the training run and its exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omega_qvla.policies.native import NativePolicy
from omega_qvla.training.dataset import Processor, TrainingSet, load_demonstrations
from omega_qvla.training.families import TrainedFamily
from omega_qvla.training.train import Trainer, TrainingPlan

MISMATCH = 0.08
"""Share of samples with the instruction of another scene and the label "hold still"."""
SHARES = {"pick-place-v3": 2.0, "push-v3": 1.5}
"""How often a task is drawn, relative to 1: the harder ones more often."""


def train_policy(
    family: TrainedFamily,
    demonstrations: Path,
    tasks: Sequence[str],
    plan: TrainingPlan,
    directory: Path,
    report: Callable[[Mapping[str, float]], None],
    *,
    processor: Processor | None = None,
    until: int | None = None,
    export_every: int = 500,
) -> NativePolicy:
    """Train on ``demonstrations`` and write the policy to ``directory``; continues if interrupted.

    ``directory/run`` holds what is needed to continue; the policy itself, in its family's layout,
    is written every ``export_every`` steps and at the end.  ``processor`` keeps the statistics and
    the vocabulary of an earlier round; ``until`` stops before the plan's last step.
    """
    sets = load_demonstrations(demonstrations, tasks)
    fitted = processor or family.processor(sets)
    data = TrainingSet(sets, fitted, family.text, mismatch=MISMATCH, shares=SHARES)
    trainer = Trainer(family, data, plan, directory / "run")

    def export() -> NativePolicy:
        policy = trainer.averaged_policy()
        directory.mkdir(parents=True, exist_ok=True)
        family.write(policy, directory)
        return policy

    def export_too(point: Mapping[str, float]) -> None:
        report(point)
        if int(point["step"]) % export_every == 0:
            export()

    trainer.train(export_too, until=until)
    return export()
