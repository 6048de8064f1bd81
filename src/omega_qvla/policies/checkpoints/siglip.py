"""The two ways transformers names the tensors of a SigLIP vision tower.

Up to 5.5 the tower is a module inside another, ``vision_tower.vision_model.embeddings…``; from 5.6
on it is not, ``vision_tower.embeddings…``.  A checkpoint has the names of the transformers it was
saved with, and openpi's are the older ones.
"""

from __future__ import annotations

from omega_qvla.errors import PolicyError
from omega_qvla.policies.checkpoints.shards import StoredTensors

INSIDE = "vision_model."


def nested_tower(stored: StoredTensors, tower: str) -> StoredTensors:
    """The same tensors, those of a vision tower under the older names.

    Args:
        stored: the checkpoint, without a prefix.
        tower: the outer module, ``….vision_tower``.

    Raises:
        PolicyError: some are named one way and some the other.
    """
    outer = f"{tower}."
    names = [name for name in stored.headers if name.startswith(outer)]
    flat = [name for name in names if not name.startswith(outer + INSIDE)]
    if not flat:
        return stored
    if len(flat) < len(names):
        nested = next(name for name in names if name not in flat)
        raise PolicyError(
            f"{stored.where} names its vision tower in two ways, {nested} as transformers up to "
            f"5.5 and {flat[0]} as later ones: parts of two checkpoints were mixed"
        )
    kept = frozenset(flat)
    return stored.renamed(
        lambda name: outer + INSIDE + name.removeprefix(outer) if name in kept else name
    )
