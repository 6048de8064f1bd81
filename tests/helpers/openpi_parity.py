"""Our policy beside openpi's on the same checkpoint, observations and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from openpi_cases import PROMPTS, STEP, TOKENIZER, Case
from safetensors import safe_open

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies import native
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.native import NativePolicy

JAX, PYTORCH, ACTIONS = 1e-4, 1e-5, 5e-4
"""Largest differences allowed, of values of about 1 to 5.

openpi subtracts 1/steps over and over in float32, and the fastest of the time features has a period
of 0.004 (docs/parity.md).  Chunks are therefore compared at openpi's times; seen were 8.3e-5 from
JAX, which computes those features in float32, and 7.2e-7 from PyTorch, in float64.  Actions are
computed as a user computes them, at our times: seen was 3.5e-4.
"""

HEADER = f"{'case':24} {'tokens':>6} {'JAX':>9} {'PyTorch':>9} {'actions':>9}"


@dataclass(frozen=True)
class Difference:
    """The largest differences over the observations of a case.

    Attributes:
        tokens: how many token ids are others.
        jax, pytorch: of normalized chunks, at openpi's times; None where openpi has no PyTorch.
        actions: in the robot's units, from JAX, at our times.
    """

    tokens: int
    jax: float
    pytorch: float | None
    actions: float

    def within_bounds(self) -> bool:
        """Whether the three are the same policy."""
        exact = self.jax <= JAX and (self.pytorch or 0.0) <= PYTORCH
        return self.tokens == 0 and exact and self.actions <= ACTIONS

    def row(self, name: str) -> str:
        """One line of a table."""
        pytorch = f"{'-':>9}" if self.pytorch is None else f"{self.pytorch:9.1e}"
        return f"{name:24} {self.tokens:6d} {self.jax:9.1e} {pytorch} {self.actions:9.1e}"


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


def observation(record: Mapping[str, np.ndarray], number: int, case: Case) -> dict[str, object]:
    """One observation of a record, without the camera that is masked."""
    images = dict(zip(case.training["cameras"], record["images"][number], strict=False))
    return {"images": images, "state": record["states"][number], "prompt": PROMPTS[number]}


def openpis_times(steps: int) -> list[float]:
    """The flow times of openpi's loop, float32."""
    time, change, times = np.float32(1.0), np.float32(-1.0 / steps), []
    for _ in range(steps):
        times.append(float(time))
        time = np.float32(time + change)
    return times


def compare(folder: Path, case: Case) -> Difference:
    """Ours against what is recorded."""
    policy, record = load(folder), read_record(folder)
    timed = load(folder)  # a policy keeps what it has tabulated over time
    tokens, furthest = 0, {"chunk.jax": 0.0, "chunk.pytorch": 0.0, "actions.jax": 0.0}
    for number in range(len(PROMPTS)):
        seen, noise = observation(record, number, case), record["noise"][number]
        real = record["in.tokenized_prompt_mask"][number]
        theirs = record["in.tokenized_prompt"][number][real].tolist()
        ours = policy.processor.encode(seen)[1].tolist()[0]
        tokens += sum(a != b for a, b in zip(ours, theirs, strict=False))
        tokens += abs(len(ours) - len(theirs))
        found = {"actions.jax": policy.sample_actions(seen, noise=noise)}
        with mock.patch.object(native, "euler_times", openpis_times):
            chunk = timed.sample_normalized(seen, noise=noise).numpy()
        found |= {"chunk.jax": chunk, "chunk.pytorch": chunk}
        for kind, values in found.items():
            if kind in record:
                recorded = record[kind][number, :, : values.shape[-1]]
                furthest[kind] = max(furthest[kind], float(np.abs(values - recorded).max()))
    pytorch = furthest["chunk.pytorch"] if case.converts else None
    return Difference(tokens, furthest["chunk.jax"], pytorch, furthest["actions.jax"])
