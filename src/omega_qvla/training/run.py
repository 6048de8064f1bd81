"""From demonstrations on disk to a policy directory: the training run and its exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omega_qvla.policies.checkpoints.openpi import write_openpi
from omega_qvla.policies.pi05_policy import Pi05Policy, Pi05Processor
from omega_qvla.training.dataset import TrainingSet, load_demonstrations, make_processor
from omega_qvla.training.train import Trainer, TrainingPlan

MISMATCH = 0.08
"""Share of samples with the instruction of another scene and the label "hold still"."""
SHARES = {"pick-place-v3": 2.0, "push-v3": 1.5}
"""How often a task is drawn, relative to 1: the harder ones more often."""


def train_policy(
    demonstrations: Path,
    tasks: Sequence[str],
    plan: TrainingPlan,
    directory: Path,
    report: Callable[[Mapping[str, float]], None],
    *,
    processor: Pi05Processor | None = None,
    until: int | None = None,
    export_every: int = 500,
) -> Pi05Policy:
    """Train on ``demonstrations`` and write the policy to ``directory``; continues if interrupted.

    ``directory/run`` holds what is needed to continue; the policy itself, in openpi's layout, is
    written every ``export_every`` steps and at the end.  ``processor`` keeps the statistics and the
    vocabulary of an earlier round; ``until`` stops before the plan's last step.
    """
    sets = load_demonstrations(demonstrations, tasks)
    data = TrainingSet(sets, processor or make_processor(sets), mismatch=MISMATCH, shares=SHARES)
    trainer = Trainer(data, plan, directory / "run")

    def export_too(point: Mapping[str, float]) -> None:
        report(point)
        if int(point["step"]) % export_every == 0:
            _export(trainer, directory)

    trainer.train(export_too, until=until)
    return _export(trainer, directory)


def _export(trainer: Trainer, directory: Path) -> Pi05Policy:
    policy = Pi05Policy(trainer.averaged_module(), trainer.data.processor)
    directory.mkdir(parents=True, exist_ok=True)
    write_openpi(policy, directory)
    return policy
