"""A SigLIP vision tower in a checkpoint: its sizes and its names.

transformers names its tensors in two ways.  Up to 5.5 the tower is a module inside another,
``vision_tower.vision_model.embeddings…``; from 5.6 on it is not, ``vision_tower.embeddings…``.  A
checkpoint has the names of the transformers it was saved with, and openpi's are the older ones.
"""

from __future__ import annotations

import math

from omega_qvla.checkpoints.shapes import Shapes
from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.checkpoints.tied import Tie, TiedHalf, untie
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip import VisionConfig

INSIDE = "vision_model."

VISION_HEADS: dict[tuple[int, int], int] = {(1152, 4304): 16}
"""(width, hidden width) of a SigLIP tower → its attention heads: So400m/14."""


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


def tower_sizes(shape: Shapes, stem: str) -> VisionConfig:
    """The sizes of a SigLIP tower.

    Args:
        shape: of the checkpoint's tensors.
        stem: the tower's path.

    Raises:
        PolicyError: a tensor is missing, or the number of heads is not known.
    """
    width, _, patch, _ = shape(f"{stem}.embeddings.patch_embedding.weight", 4)
    positions, _ = shape(f"{stem}.embeddings.position_embedding.weight", 2)
    hidden, _ = shape(f"{stem}.encoder.layers.0.mlp.fc1.weight", 2)
    edge = math.isqrt(positions)
    if edge * edge != positions:
        raise PolicyError(f"{shape.where}: {positions} vision positions are no square of patches")
    heads = VISION_HEADS.get((width, hidden))
    if heads is None:
        raise PolicyError(
            f"{shape.where} has a vision tower of width {width} and hidden width {hidden}, of "
            f"which no number of heads is known; known: {sorted(VISION_HEADS)}. Give the sizes "
            "in a config.json (docs/checkpoints.md)"
        )
    return VisionConfig(
        width=width,
        hidden=hidden,
        heads=heads,
        depth=shape.depth(f"{stem}.encoder.layers"),
        image_size=edge * patch,
        patch_size=patch,
    )


def official_names(
    stored: StoredTensors, tower: str, tie: Tie, told: TiedHalf | None
) -> StoredTensors:
    """The tensors under the original's names, whichever transformers they were saved with.

    Args:
        stored: the checkpoint, without a prefix.
        tower: the outer module of the vision tower, ``….vision_tower``.
        tie: the names of token embedding and head, and whether the original keeps them apart.
        told: which half of the tie to take where they differ, or None.

    Raises:
        PolicyError: the vision tower has the names of two of them; or as ``untie``.
    """
    return untie(nested_tower(stored, tower), tie, told)
