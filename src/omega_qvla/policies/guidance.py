"""What guides a batch of chunks to continue the ones before, as tensors.

``real_time_chunking.py`` has the maths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omega_qvla.real_time_chunking import LeftOver, RealTimeChunking, guidance_weight


class Guidance(NamedTuple):
    """What chunks are to continue, normalized.

    Attributes:
        previous: [B, horizon, action_dim] left-overs, zeros where there is none.
        weights: [B, horizon, action_dim] in [0, 1].
        most: [B, 1, 1] bounds of the guidance weight.
    """

    previous: Tensor
    weights: Tensor
    most: Tensor

    @classmethod
    def to(
        cls, left_over: LeftOver, chunking: RealTimeChunking, shape: tuple[int, int]
    ) -> Guidance:
        """One row that guides to a left-over, which is in the network's units.

        Args:
            left_over: at most as long and as wide as the chunk; zeros where it is less.
            chunking: how it is continued.
            shape: (horizon, action_dim) of the chunk.
        """
        length, width = left_over.actions.shape
        previous = np.zeros((1, *shape), np.float32)
        previous[0, :length, :width] = left_over.actions
        weights = chunking.prefix_weights(left_over.delay, length, shape[0])
        return cls(
            torch.from_numpy(previous),
            torch.from_numpy(np.repeat(weights[None, :, None], shape[1], axis=2)),
            torch.full((1, 1, 1), chunking.max_guidance_weight),
        )

    def correction(self, chunk: Tensor, t: float) -> Tensor:
        """What is subtracted from the velocity at flow time t, which leads to ``chunk``."""
        return self.most.clamp(max=guidance_weight(t)) * (self.weights * (self.previous - chunk))


def together(rows: Sequence[Guidance | None]) -> Guidance | None:
    """The guidance of a batch out of its rows'; a row without any is not moved."""
    given = [row for row in rows if row is not None]
    if not given:
        return None
    nothing = Guidance(*(torch.zeros_like(part) for part in given[0]))
    filled = [nothing if row is None else row for row in rows]
    return Guidance(*(torch.cat(parts) for parts in zip(*filled, strict=True)))
