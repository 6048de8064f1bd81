"""Sizes read off the shapes of tensors, for checkpoints whose configuration does not have them.

Widths, depths and image sizes show.  How a projection is divided into heads does not, so heads come
from the published variants, and a shape that fits none of them is refused rather than guessed.
"""

from __future__ import annotations

import math
import re

from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.shards import StoredTensors
from omega_qvla.policies.layers import VisionConfig

VISION_HEADS: dict[tuple[int, int], int] = {(1152, 4304): 16}
"""(width, hidden width) of a SigLIP tower → its attention heads: So400m/14."""


class Shapes:
    """Shapes of tensors that must be there.

    Args:
        stored: the checkpoint, under official names.
    """

    def __init__(self, stored: StoredTensors) -> None:
        self.headers, self.where = stored.headers, stored.where

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        """One tensor's shape.

        Raises:
            PolicyError: there is no such tensor, or it has another rank or no elements.
        """
        if name not in self.headers:
            raise PolicyError(f"{self.where} does not fit the policy: missing {name}")
        shape = self.headers[name].shape
        if len(shape) != rank or 0 in shape:
            raise PolicyError(f"{self.where}: {name} has shape {list(shape)}, expected rank {rank}")
        return shape

    def depth(self, stem: str) -> int:
        """How many numbered layers there are below a name; the highest number counts."""
        pattern = re.compile(re.escape(stem) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, self.headers) if m), default=-1)

    def vision(self, stem: str) -> VisionConfig:
        """The sizes of a SigLIP tower.

        Raises:
            PolicyError: a tensor is missing, or the number of heads is not known.
        """
        width, _, patch, _ = self(f"{stem}.embeddings.patch_embedding.weight", 4)
        positions, _ = self(f"{stem}.embeddings.position_embedding.weight", 2)
        hidden, _ = self(f"{stem}.encoder.layers.0.mlp.fc1.weight", 2)
        edge = math.isqrt(positions)
        if edge * edge != positions:
            raise PolicyError(
                f"{self.where}: {positions} vision positions are no square of patches"
            )
        heads = VISION_HEADS.get((width, hidden))
        if heads is None:
            raise PolicyError(
                f"{self.where} has a vision tower of width {width} and hidden width {hidden}, of "
                f"which no number of heads is known; known: {sorted(VISION_HEADS)}. Give the sizes "
                "in a config.json (docs/checkpoints.md)"
            )
        return VisionConfig(
            width=width,
            hidden=hidden,
            heads=heads,
            depth=self.depth(f"{stem}.encoder.layers"),
            image_size=edge * patch,
            patch_size=patch,
        )
