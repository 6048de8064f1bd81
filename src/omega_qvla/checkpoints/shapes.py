"""Sizes read off the shapes of tensors, for checkpoints whose configuration does not have them.

Widths, depths and image sizes show.  How a projection is divided into heads does not, so heads come
from the published variants, and a shape that fits none of them is refused rather than guessed.
"""

from __future__ import annotations

import re

from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.errors import PolicyError


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
