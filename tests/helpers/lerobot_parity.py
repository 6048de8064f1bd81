"""Our policy beside LeRobot's on the same checkpoint, observations and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lerobot_cases import MIDDLE, OLD, Case, noise, observations
from safetensors import safe_open

from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.layers import siglip_checkpoints

TOKENIZER = Path(__file__).parents[1] / "parity" / "golden" / "tokenizer.model"
PIXELS, VALUES = 1e-6, 1e-5
"""Largest differences allowed, of pixels in [-1, 1] and of states and actions, all about 1 to 5.

Seen are 0 and 9.5e-7: LeRobot normalizes in float32, we in float64, and sums are ordered
differently.
"""

Record = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """The largest differences from LeRobot over the observations of a case.

    Attributes:
        tokens: how many token ids are others.
        pixels: of what the vision tower sees.
        state: normalized.
        chunk: normalized.
        actions: in the robot's units, alone and batched.
    """

    tokens: int
    pixels: float
    state: float
    chunk: float
    actions: float

    def within_bounds(self) -> bool:
        """Whether the two are the same policy."""
        values = max(self.state, self.chunk, self.actions)
        return self.tokens == 0 and self.pixels <= PIXELS and values <= VALUES

    def row(self, name: str) -> str:
        """One line of a table."""
        numbers = "  ".join(f"{value:9.1e}" for value in list(asdict(self).values())[1:])
        return f"{name:28} {self.tokens:6d}  {numbers}"


HEADER = f"{'case':28} {'tokens':>6}  {'pixels':>9}  {'state':>9}  {'chunk':>9}  {'actions':>9}"


def read_record(path: Path) -> Record:
    """The tensors of ``record.safetensors``."""
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def choices_of(case: Case) -> CheckpointOptions:
    """What a user has to say of the checkpoint of a case: only these two releases leave it open."""
    said: dict[str, Any] = {OLD: "lerobot-0.4", MIDDLE: "lerobot-0.5"}
    return CheckpointOptions(tokenizer=TOKENIZER, written_by=said.get(case.written_by))


def know_small_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of the shrunken vision tower, which its shapes do not tell."""
    monkeypatch.setitem(siglip_checkpoints.VISION_HEADS, (64, 72), 2)


def compare(
    checkpoint: Path, record: Record, case: Case, choices: CheckpointOptions | None = None
) -> Difference:
    """Load a checkpoint with ours and give it what LeRobot was given.

    Args:
        checkpoint: its directory.
        record: what LeRobot computed.
        case: what both are of.
        choices: other answers than those that are right for the case.

    Raises:
        PolicyError: ours refuses the checkpoint.
    """
    policy = load_policy(checkpoint, choices or choices_of(case))
    processor, tokens, found = policy.processor, 0, dict.fromkeys(("pixels", "state", "chunk"), 0.0)
    alone = []

    def differ(key: str, ours: Any, theirs: np.ndarray) -> None:
        ours = np.asarray(ours, np.float32)
        assert ours.shape == theirs.shape, (key, ours.shape, theirs.shape)
        found[key] = max(found[key], float(np.abs(ours - theirs).max()))

    for i, observation in enumerate(observations(case)):
        pixels, token_ids = processor.encode(observation)[:2]
        differ("pixels", pixels[0], record["pixels"][i][record["cameras"][i]])
        expected = record["tokens"][i][record["mask"][i]].tolist()
        ours = token_ids[0].tolist()
        tokens += sum(a != b for a, b in zip(ours, expected, strict=False))
        tokens += abs(len(ours) - len(expected))
        state = processor.statistics.state.normalize(observation["state"])
        differ("state", state, record["state"][i])
        start = torch.from_numpy(noise()[i])
        differ("chunk", policy.sample_normalized(observation, start), record["chunk"][i])
        alone.append(policy.sample_actions(observation, start))
    together = policy.sample_batch([policy.encode(o) for o in observations(case)], list(noise()))
    found["actions"] = 0.0
    differ("actions", alone, record["actions"])
    differ("actions", together, record["actions"])
    return Difference(tokens, **found)
