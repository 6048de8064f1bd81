"""Steps as openpi's JAX trainer saves them, made with tensorstore: of any size, without JAX.

What the trainer itself saves is in ``tests/parity/golden/openpi_jax``; this is for steps that it
would not save, and for full size, where arrays are made one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

Shape = tuple[int, ...]

LARGEST_CHUNK = 2 << 30
"""Orbax's: a larger array is halved along its longest axis until it fits."""

_ATTENTION = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0"


def full_shapes(action_dim: int = 32) -> dict[str, Shape]:
    """The arrays of pi0.5 at full size."""
    block, image, text = "PaliGemma/img/Transformer/encoderblock", "PaliGemma/img", "PaliGemma/llm"
    shapes: dict[str, Shape] = {
        f"{image}/embedding/kernel": (14, 14, 3, 1152),
        f"{image}/embedding/bias": (1152,),
        f"{image}/pos_embedding": (1, 256, 1152),
        f"{image}/head/kernel": (1152, 2048),
        f"{image}/head/bias": (2048,),
        f"{image}/Transformer/encoder_norm/scale": (1152,),
        f"{image}/Transformer/encoder_norm/bias": (1152,),
        f"{block}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        f"{block}/MlpBlock_0/Dense_0/bias": (27, 4304),
        f"{block}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        f"{block}/MlpBlock_0/Dense_1/bias": (27, 1152),
        f"{_ATTENTION}/out/kernel": (27, 16, 72, 1152),
        f"{_ATTENTION}/out/bias": (27, 1152),
        f"{text}/embedder/input_embedding": (257152, 2048),
        f"{text}/final_norm/scale": (2048,),
        f"{text}/final_norm_1/Dense_0/kernel": (1024, 3072),
        f"{text}/final_norm_1/Dense_0/bias": (3072,),
        "action_in_proj/kernel": (action_dim, 1024),
        "action_in_proj/bias": (1024,),
        "action_out_proj/kernel": (1024, action_dim),
        "action_out_proj/bias": (action_dim,),
    }
    for name in ("LayerNorm_0", "LayerNorm_1"):
        shapes |= {f"{block}/{name}/scale": (27, 1152), f"{block}/{name}/bias": (27, 1152)}
    for name in ("query", "key", "value"):
        shapes[f"{_ATTENTION}/{name}/kernel"] = (27, 1152, 16, 72)
        shapes[f"{_ATTENTION}/{name}/bias"] = (27, 16, 72)
    for suffix, width, hidden in (("", 2048, 16384), ("_1", 1024, 4096)):
        layers = f"{text}/layers"
        shapes |= {
            f"{layers}/attn/q_einsum{suffix}/w": (18, 8, width, 256),
            f"{layers}/attn/kv_einsum{suffix}/w": (18, 2, 1, width, 256),
            f"{layers}/attn/attn_vec_einsum{suffix}/w": (18, 8, 256, width),
            f"{layers}/mlp{suffix}/gating_einsum": (18, 2, width, hidden),
            f"{layers}/mlp{suffix}/linear": (18, hidden, width),
        }
    for name in ("pre_attention_norm", "pre_ffw_norm"):
        shapes[f"{text}/layers/{name}/scale"] = (18, 2048)
        shapes[f"{text}/layers/{name}_1/Dense_0/kernel"] = (18, 1024, 3072)
        shapes[f"{text}/layers/{name}_1/Dense_0/bias"] = (18, 3072)
    for name in ("time_mlp_in", "time_mlp_out"):
        shapes |= {f"{name}/kernel": (1024, 1024), f"{name}/bias": (1024,)}
    return shapes


def drawn(name: str, shape: Shape) -> np.ndarray:
    """Random bfloat16 values of a trained network's size, made without a larger copy."""
    generator = np.random.default_rng(list(name.encode()))
    spread = 0.02 if len(shape) < 3 and "kernel" not in name else max(shape[-3:-1]) ** -0.5
    found = np.empty(shape, ml_dtypes.bfloat16)
    flat = found.reshape(-1)
    for start in range(0, len(flat), 1 << 24):
        part = generator.standard_normal(min(1 << 24, len(flat) - start), np.float32)
        flat[start : start + len(part)] = part * np.float32(spread)
    return found


def write_step(
    directory: Path,
    arrays: Mapping[str, Shape],
    values: Callable[[str, Shape], np.ndarray] | None,
    *,
    dtype: str = "bfloat16",
    chunks: Mapping[str, Shape] | None = None,
) -> None:
    """A finished step.

    Args:
        directory: created if needed.
        arrays: name, with slashes → shape.
        values: of one array; None writes the arrays without data.
        dtype: of an array without data; those with data have their own.
        chunks: name → shape of its chunks, where Orbax would choose another.
    """
    item = directory / "params"
    item.mkdir(parents=True)
    tree: dict[str, Any] = {}
    for name, shape in arrays.items():
        array = None if values is None else values(name, shape)
        kind = np.dtype(dtype) if array is None else array.dtype
        path = ("params", *name.split("/"), "value")
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{item.resolve()}/"},
                "path": f"{'.'.join(path)}/",
                "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000},
            },
            "metadata": {
                "shape": list(shape),
                "chunks": (chunks or {}).get(name) or _chunk(shape, kind.itemsize),
                "compressor": {"id": "zstd"},
            },
            "store_data_equal_to_fill_value": True,
            "dtype": kind.name,
        }
        store = tensorstore.open(spec, create=True).result()
        if array is not None:
            store.write(array).result()
    metadata = {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False}
    (item / "_METADATA").write_text(json.dumps(metadata))
    step = {"item_handlers": {"params": "PyTreeCheckpointHandler"}, "commit_timestamp_nsecs": 1}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(step))


def _chunk(shape: Shape, itemsize: int) -> list[int]:
    sizes = [max(1, size) for size in shape]
    while sizes and int(np.prod(sizes, dtype=np.int64)) * itemsize > LARGEST_CHUNK:
        longest = sizes.index(max(sizes))
        sizes[longest] //= 2
    return sizes
