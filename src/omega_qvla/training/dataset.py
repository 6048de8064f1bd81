"""Demonstrations of several tasks as one training set, and the batches drawn from it.

Everything is kept in the network's terms: uint8 pixels, token ids of the prompt, normalized states
and action chunks.

**Mismatched instructions.**  Scenes differ between tasks, so a policy could recognise its task from
the image and ignore what it is told.  A share of every batch is therefore given the instruction of
a task of *another* scene, and the label "hold still": no motion, gripper as the expert has it.
Tasks that share a scene (a faucet to open or close, a puck to push or to carry) are never paired in
this way; between them only the instruction decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from omega_qvla.evaluation.simulators.metaworld_tasks import BASE_VIEW, TASKS, WRIST_VIEW, project
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.tokenizers import Tokenizer
from omega_qvla.training.demonstrations import CAMERAS, Demonstrations


class Processor(Protocol):
    """What a training set needs of a policy's processor."""

    @property
    def config(self) -> Any: ...

    @property
    def statistics(self) -> NormalizationStatistics: ...

    @property
    def tokenizer(self) -> Tokenizer: ...


PromptText = Callable[[str, np.ndarray], str]
"""Instruction and normalized state [4] → the text that the tokenizer is given."""


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [B, V, H, W, 3], tokens int64 [B, T] right-padded to one T, lengths int64 [B],
    state float32 [B, 4] and actions float32 [B, horizon, 4] normalized, positions float32 [B, 6]
    standardized.
    """

    pixels: Tensor
    tokens: Tensor
    lengths: Tensor
    state: Tensor
    actions: Tensor
    positions: Tensor
    points: Tensor


class TrainingSet:
    """All samples in memory, and random batches of them."""

    def __init__(
        self,
        sets: Sequence[Demonstrations],
        processor: Processor,
        text: PromptText,
        *,
        mismatch: float,
        shares: Mapping[str, float],
    ) -> None:
        self.processor = processor
        self._text = text
        self.mismatch = mismatch
        self.tasks = [d.task for d in sets]
        self._shares = torch.tensor([shares.get(task, 1.0) for task in self.tasks])
        self._pixels = {c: torch.from_numpy(_concat(sets, c)) for c in CAMERAS}
        self._task = torch.cat([torch.full((len(d),), i) for i, d in enumerate(sets)])
        state = np.concatenate([d.state for d in sets])
        self._state = processor.statistics.state.normalize(state)
        actions = np.concatenate([d.actions for d in sets])
        self._actions = torch.from_numpy(processor.statistics.actions.normalize(actions))
        still = processor.statistics.actions.normalize(np.zeros(actions.shape[-1], np.float32))
        self._still = torch.from_numpy(still[:3])
        positions = np.concatenate([d.positions for d in sets])
        self._positions = _position_targets(positions, state[:, :3])
        self._points = _image_points(positions.reshape(-1, 2, 3), state[:, None, :3])
        self._others = _tasks_of_other_scenes(self.tasks)
        self._longest = max(len(self._encode(task, self._state[0])) for task in self.tasks)

    def __len__(self) -> int:
        return len(self._task)

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """``size`` samples, drawn with replacement, tasks in proportion to their shares."""
        task = torch.multinomial(self._shares, size, replacement=True, generator=generator)
        index = torch.empty(size, dtype=torch.int64)
        for i in range(len(self.tasks)):
            mine = (task == i).nonzero().flatten()
            pool = (self._task == i).nonzero().flatten()
            index[mine] = pool[torch.randint(len(pool), (len(mine),), generator=generator)]
        actions = self._actions[index].clone()
        told = task.tolist()
        wrong = torch.rand(size, generator=generator) < self.mismatch
        for i in wrong.nonzero().flatten().tolist():
            others = self._others[told[i]]
            if others:
                told[i] = others[int(torch.randint(len(others), (), generator=generator))]
                actions[i, :, :3] = self._still
        tokens, lengths = self._tokenize(index.tolist(), told)
        pixels = torch.stack([self._pixels[c][index] for c in CAMERAS], dim=1)
        targets = self._positions[index], self._points[index]
        state = torch.from_numpy(self._state)[index]
        return Batch(pixels, tokens, lengths, state, actions, *targets)

    def _encode(self, task: str, state: np.ndarray) -> list[int]:
        """Token ids of a prompt; their number depends on the instruction alone."""
        return self.processor.tokenizer.encode(self._text(TASKS[task].instruction, state))

    def _tokenize(self, index: list[int], told: list[int]) -> tuple[Tensor, Tensor]:
        rows: list[list[int]] = []
        for i, task in zip(index, told, strict=True):
            rows.append(self._encode(self.tasks[task], self._state[i]))
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.zeros(len(rows), self._longest, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row)
        return tokens, lengths


def _position_targets(positions: np.ndarray, hand: np.ndarray) -> Tensor:
    """Object and goal [N, 6] in metres → [N, 12], see ``Batch``."""
    spread = np.maximum(positions.std(0), 0.05)
    absolute = (positions - positions.mean(0)) / spread
    relative = np.clip((positions - np.tile(hand, 2)) / 0.1, -1.0, 1.0)
    return torch.from_numpy(np.concatenate((absolute, relative), axis=1).astype(np.float32))


def _image_points(points: np.ndarray, hand: np.ndarray) -> Tensor:
    """Object and goal [N, 2, 3] → where the cameras see them, [N, V, 2, 2]."""
    base = project(points, np.array(BASE_VIEW.lookat), BASE_VIEW)
    wrist = project(points, hand + np.array(WRIST_VIEW.lookat), WRIST_VIEW)
    return torch.from_numpy(np.stack((base, wrist), axis=1).astype(np.float32))


def _concat(sets: Sequence[Demonstrations], camera: str) -> np.ndarray:
    return np.concatenate([d.images[camera] for d in sets])


def _tasks_of_other_scenes(tasks: Sequence[str]) -> list[list[int]]:
    scenes = [TASKS[task].scene for task in tasks]
    return [[j for j, other in enumerate(scenes) if other != scene] for scene in scenes]


def load_demonstrations(directory: Path, tasks: Sequence[str]) -> list[Demonstrations]:
    """The files ``<task>.npz`` and, where there are any, ``<task>.<round>.npz`` of each task."""
    found: list[Demonstrations] = []
    for task in tasks:
        parts = [Demonstrations.load(path) for path in sorted(directory.glob(f"{task}.*npz"))]
        if not parts:
            raise FileNotFoundError(f"no demonstrations of {task} in {directory}")
        found.append(_merge(parts))
    return found


def _merge(parts: Sequence[Demonstrations]) -> Demonstrations:
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(int(p.episode.max()) + 1 for p in parts[:-1])])
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("state", "actions", "positions")
    }
    return Demonstrations(
        task=parts[0].task,
        images={c: np.concatenate([p.images[c] for p in parts]) for c in CAMERAS},
        episode=np.concatenate([p.episode + o for p, o in zip(parts, offsets, strict=True)]),
        **arrays,
    )
