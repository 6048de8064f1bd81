"""Our policy beside openpi's on the same checkpoint, observations and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from openpi_cases import CAMERAS, PROMPTS, STEP, TOKENIZER, Case
from safetensors import safe_open

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy

CHUNKS = 1e-4
"""Largest difference allowed of actions, all about 1 to 5: openpi subtracts 1/steps over and over
in float32 (docs/parity.md)."""

HEADER = f"{'case':28} {'tokens':>6}  {'JAX':>9}  {'PyTorch':>9}"


@dataclass(frozen=True)
class Difference:
    """The largest differences over the observations of a case.

    Attributes:
        tokens: how many token ids are others.
        jax, pytorch: of actions in the robot's units; None where openpi cannot compute them.
    """

    tokens: int
    jax: float
    pytorch: float | None

    def within_bounds(self) -> bool:
        """Whether the three are the same policy."""
        return self.tokens == 0 and max(self.jax, self.pytorch or 0.0) <= CHUNKS

    def row(self, name: str) -> str:
        """One line of a table."""
        pytorch = f"{'-':>9}" if self.pytorch is None else f"{self.pytorch:9.1e}"
        return f"{name:28} {self.tokens:6d}  {self.jax:9.1e}  {pytorch}"


def read_record(folder: Path) -> dict[str, np.ndarray]:
    """What openpi computed of a case."""
    with safe_open(folder / "record.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def choices_of(folder: Path) -> CheckpointOptions:
    """What a user has to say of a case."""
    return CheckpointOptions(training_config=str(folder / "training.json"), tokenizer=TOKENIZER)


def load(folder: Path) -> NativePolicy:
    """Our policy of a case."""
    return load_policy(folder / str(STEP), choices_of(folder))


def observation(record: Mapping[str, np.ndarray], number: int) -> dict[str, object]:
    """One observation of a record."""
    images = dict(zip(CAMERAS, record["images"][number], strict=True))
    return {"images": images, "state": record["states"][number], "prompt": PROMPTS[number]}


def compare(folder: Path, case: Case) -> Difference:
    """Ours against what is recorded."""
    policy, record = load(folder), read_record(folder)
    tokens, furthest = 0, {"jax": 0.0, "pytorch": 0.0}
    for number in range(len(PROMPTS)):
        seen = observation(record, number)
        real = record["in.tokenized_prompt_mask"][number]
        theirs = record["in.tokenized_prompt"][number][real].tolist()
        ours = policy.processor.encode(seen)[1].tolist()[0]
        tokens += sum(a != b for a, b in zip(ours, theirs, strict=False))
        tokens += abs(len(ours) - len(theirs))
        actions = policy.sample_actions(seen, noise=record["noise"][number])
        for kind in furthest:
            if f"actions.{kind}" in record:
                apart = np.abs(actions - record[f"actions.{kind}"][number]).max()
                furthest[kind] = max(furthest[kind], float(apart))
    return Difference(tokens, furthest["jax"], furthest["pytorch"] if case.converts else None)
