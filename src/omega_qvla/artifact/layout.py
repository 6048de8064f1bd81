"""What an artifact stores of a quantized site and of a token embedding: the one schema.

Everything that has to know is derived from the two tables here: how many bytes an artifact will
take, what a loaded one must hold, what a journal keeps of a finished site, and the table of
docs/artifact.md (``tools/artifact_table.py``).

N outputs read K inputs; the transform makes K' of them, K padded to whole blocks of B (K without a
transform); r is the rank of the low-rank branch; scales and offsets are given at ``steps`` flow
times.  An embedding has V rows of D columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from omega_qvla.artifact.packing import packed_width
from omega_qvla.recipe import Scheme

EMBEDDING_GROUP = 64
"""Columns per scale of 4-bit embedding rows."""


class TensorSpec(NamedTuple):
    """What a stored tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.dtype.itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


Layout = dict[str, TensorSpec]
"""Tensors by name, or by kind within one site."""


class Kind(NamedTuple):
    """One row of the schema.

    Attributes:
        name: last part of the tensor's name.
        dtype: as PyTorch has it.
        shape: names of extents.
        stored: when there is such a tensor; a key of the facts about a scheme.
        meaning: for the documentation.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[str, ...]
    stored: str
    meaning: str


ALWAYS = "always"
SITE_KINDS: tuple[Kind, ...] = (
    Kind("weight_packed", torch.int32, ("N", "K'/8"), "4-bit weights",
         "eight 4-bit integers a word; see below"),
    Kind("weight_packed", torch.int8, ("N", "K'"), "8-bit weights", "the integers"),
    Kind("weight_scale", torch.float32, ("N",), "no `group`", "step of the integers"),
    Kind("weight_scale", torch.float32, ("N", "K'/group"), "`group`",
         "step of the integers of each group of inputs"),
    Kind("weight_shape", torch.int64, ("2",), ALWAYS, "N and K, before padding"),
    Kind("transform", torch.bfloat16, ("K'/B", "B", "B"), "a transform",
         "the block transform of the input"),
    Kind("permutation", torch.int32, ("K'",), "`permutation`",
         "order in which the transform reads its inputs"),
    Kind("low_rank_down", torch.bfloat16, ("r", "K"), "`low_rank`",
         "first factor of the 16-bit branch; reads the input as it is"),
    Kind("low_rank_up", torch.bfloat16, ("N", "r"), "`low_rank`", "second factor"),
    Kind("activation_scale", torch.float32, ("steps",), "a static scale",
         "scales of the activations; absent where the scale is per token"),
    Kind("activation_offset", torch.bfloat16, ("steps", "K'"), "`subtract_mean`",
         "what is subtracted from the transformed input before it is rounded"),
    Kind("activation_step_times", torch.float32, ("steps",), "a static scale or `subtract_mean`",
         "the flow times those scales and offsets belong to, descending"),
    Kind("bias", torch.float32, ("N",), "a bias, not `subtract_mean`", "added to the product"),
    Kind("bias", torch.float32, ("steps", "N"), "`subtract_mean`",
         "the bias, with the offset's product o W'ᵀ included"),
)  # fmt: skip
"""Of a site of a recipe that can be multiplied as integers."""

SIMULATED_KINDS: tuple[Kind, ...] = (
    Kind("activation_scale", torch.float32, ("steps", "K'"), "a scale per channel",
         "scales of the activations"),
    Kind("output_rotation", torch.float32, ("N/B", "B", "B"), "`output_rotation`",
         "rotation of the output"),
)  # fmt: skip
"""What a simulation has besides; only journals hold such sites."""

EMBEDDING_KINDS: tuple[Kind, ...] = (
    Kind("weight", torch.int32, ("V", "D/8"), "4 bits", "eight 4-bit integers a word"),
    Kind("weight_scale", torch.bfloat16, ("V", "D/64"), "4 bits", "one step per 64 columns"),
    Kind("weight", torch.int8, ("V", "D"), "8 bits", "the integers"),
    Kind("weight_scale", torch.float32, ("V",), "8 bits", "one step per row"),
)


def stored_width(scheme: Scheme, in_features: int) -> int:
    """K', the input width that the integers of a weight have."""
    transform = scheme.transform
    return (
        in_features
        if transform.identity
        else _parts(in_features, transform.block) * (transform.block)
    )


def site_layout(
    scheme: Scheme, in_features: int, splits: Sequence[int], biased: bool, steps: int
) -> Layout:
    """The tensors of a quantized site, by kind.

    Args:
        scheme: of the site; where calibration has still to choose an activation scale, a static
            one is assumed.
        in_features: K.
        splits: output widths of the site's linears; N is their sum.
        biased: whether one of the linears has a bias.
        steps: number of flow times that its scales and offsets are for.
    """
    outputs, width = sum(splits), stored_width(scheme, in_features)
    weights, transform, activations = scheme.weights, scheme.transform, scheme.activations
    static = activations.scale in ("per_step", "per_step_or_token")
    per_channel = activations.scale == "per_channel_per_step"
    facts = {
        ALWAYS: True,
        f"{weights.bits}-bit weights": True,
        "no `group`": weights.group is None,
        "`group`": weights.group is not None,
        "a transform": not transform.identity,
        "`permutation`": transform.permutation != "none",
        "`low_rank`": weights.low_rank is not None,
        "a static scale": static,
        "a scale per channel": per_channel,
        "`subtract_mean`": activations.subtract_mean,
        "a static scale or `subtract_mean`": static or per_channel or activations.subtract_mean,
        "a bias, not `subtract_mean`": biased and not activations.subtract_mean,
        "`output_rotation`": transform.output_rotation,
    }
    extents = {
        "2": 2,
        "N": outputs,
        "K": in_features,
        "K'": width,
        "K'/8": packed_width(width),
        "K'/group": _parts(width, weights.group or width),
        "B": transform.block,
        "K'/B": _parts(width, transform.block),
        "N/B": _parts(outputs, transform.block),
        "r": min(weights.low_rank or 0, outputs, in_features),
        "steps": steps,
    }
    return _layout((*SITE_KINDS, *SIMULATED_KINDS), facts, extents)


def embedding_layout(bits: int, rows: int, width: int) -> Layout:
    """The tensors of a quantized token embedding, by kind.

    Raises:
        ValueError: no such width.
    """
    if bits not in (4, 8):
        raise ValueError(f"embedding of {bits} bits")
    extents = {
        "V": rows,
        "D": width,
        "D/8": packed_width(width),
        "D/64": _parts(width, EMBEDDING_GROUP),
    }
    return _layout(EMBEDDING_KINDS, {f"{bits} bits": True}, extents)


def _layout(kinds: Iterable[Kind], facts: Mapping[str, bool], extents: Mapping[str, int]) -> Layout:
    return {
        kind.name: TensorSpec(kind.dtype, tuple(extents[name] for name in kind.shape))
        for kind in kinds
        if facts.get(kind.stored, False)
    }


def _parts(width: int, size: int) -> int:
    """How many parts of a size a width takes, the last one perhaps not full."""
    return -(-width // size)
