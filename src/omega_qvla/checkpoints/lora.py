"""A LoRA adapter beside the base it was trained on, folded in while the weights are read.

peft saves of a fine-tune only what was trained, and the name of the base.  For a linear with the
weight W [N, K], the trained matrices A [r, K] and B [N, r] and the strength s:

    W' = W + s · B A                           (LoRA, arXiv 2106.09685)
    W' = m / |W + s · B A| · (W + s · B A)     (DoRA, arXiv 2402.09353; lengths of rows, m [N])

and for a token embedding W [V, D], A [r, V] and B [D, r]: W' = W + s · (B A)^T.  It is what peft's
``merge_and_unload`` computes, in float32 here whatever the types of base and adapter; the sum is
not rounded.  Nothing is held but the weight that is being read and its two thin matrices.

Both sides are checked before anything is computed: every tensor of the adapter has a place in the
base, every module that the adapter targets has its matrices.  (peft leaves out adapter tensors that
fit no module.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from omega_qvla.checkpoints.files import contained_file, refuse_unsafe
from omega_qvla.checkpoints.lora_settings import (
    ADAPTER_CONFIG,
    LoraSettings,
    read_lora_settings,
)
from omega_qvla.checkpoints.stored_tensors import Header, StoredTensors, read_file
from omega_qvla.checkpoints.weight_store import Change, Place, read_place
from omega_qvla.errors import PolicyError

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_ROOT = "base_model.model."
_DOWN, _UP, _UP_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_LENGTHS = "lora_magnitude_vector"
_ROWS_DOWN, _ROWS_UP = "lora_embedding_A", "lora_embedding_B"
_KINDS = (_DOWN, _UP, _UP_BIAS, _LENGTHS, _ROWS_DOWN, _ROWS_UP)
_BASE_BIAS = ".base_layer.bias"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is on disk.

    Attributes:
        where: names it in errors.
        settings: its ``adapter_config.json``.
        stored: its tensors under the names of the policy's own modules.
    """

    where: Path
    settings: LoraSettings
    stored: StoredTensors


def has_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, or part of one."""
    return any((directory / name).exists() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def read_adapter(directory: Path) -> Adapter:
    """An adapter, its values checked.

    Raises:
        PolicyError: a file is missing or damaged, or a setting is not known.
        NonFiniteError: a value is not finite.
    """
    settings = read_lora_settings(directory)
    if not (directory / ADAPTER_WEIGHTS).exists():
        refuse_unsafe(directory)
    stored = read_file(contained_file(directory, ADAPTER_WEIGHTS))
    for name, header in stored.headers.items():
        if not name.startswith(_ROOT) or header.dtype not in _FLOATS:
            raise PolicyError(
                f"{stored.where}: {name} ({header.dtype}) is no tensor of a LoRA; their names "
                f"begin with {_ROOT} and their types are float32, bfloat16 or float16"
            )
        read_place(stored.places[name])
    return Adapter(
        directory / ADAPTER_CONFIG, settings, stored.renamed(lambda n: n.removeprefix(_ROOT))
    )


def fold(base: StoredTensors, adapter: Adapter, prefix: str) -> StoredTensors:
    """The tensors of a base as an adapter changes them; nothing is computed before they are read.

    Args:
        base: the whole policy, under official names.
        adapter: what was trained.
        prefix: stands before official names in the policy that was trained.

    Raises:
        PolicyError: a tensor of the adapter has no place, one is missing, or shapes do not fit;
            names it.
    """
    paths = {name.rpartition(".")[0] for name in base.headers}
    targeted = sorted(
        path
        for path in paths
        if f"{path}.weight" in base.headers and adapter.settings.targets(prefix + path)
    )
    low_rank, whole = _by_module(adapter, prefix)
    for path in sorted({*targeted} ^ {*low_rank}):
        missing = path in targeted
        raise PolicyError(
            f"{adapter.where} targets {path}, of which {adapter.stored.where} has no matrices"
            if missing
            else f"{adapter.stored.where} has {prefix}{path}.{min(low_rank[path])}, but "
            + (
                f"{adapter.where} does not target that module"
                if path in paths
                else f"{base.where} has no such module"
            )
        )
    _require_whole(base, adapter, prefix, targeted, whole)
    changes: dict[str, Change] = {}
    for path in targeted:
        changes |= _changes(base, adapter, prefix, path, low_rank[path])
    return replace(
        base,
        headers={
            **base.headers,
            **{name: adapter.stored.headers[key] for name, key in whole.items()},
        },
        places={**base.places, **{name: adapter.stored.places[key] for name, key in whole.items()}},
        changes={**base.changes, **changes},
        decisions={**base.decisions, "adapter": _summary(base, adapter, prefix, targeted, whole)},
    )


def _by_module(adapter: Adapter, prefix: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Low-rank tensors: {module: {kind: adapter's name}}; the others: {name: adapter's name}."""
    low_rank: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in adapter.stored.headers:
        if not key.startswith(prefix):
            raise PolicyError(
                f"{adapter.stored.where}: {key} does not begin with {prefix}, as this policy's do"
            )
        name = key.removeprefix(prefix)
        kind = next((kind for kind in _KINDS if name.endswith(f".{kind}")), None)
        if kind is not None:
            low_rank.setdefault(name.removesuffix(f".{kind}"), {})[kind] = key
        elif name.endswith(_BASE_BIAS):
            whole[f"{name.removesuffix(_BASE_BIAS)}.bias"] = key
        else:
            whole[name] = key
    return low_rank, whole


def _require_whole(
    base: StoredTensors,
    adapter: Adapter,
    prefix: str,
    targeted: list[str],
    whole: Mapping[str, str],
) -> None:
    """The tensors that replace the base's must be those that the settings announce."""
    announced = set(_announced(base, adapter.settings, prefix, targeted))
    for name in sorted(announced ^ set(whole)):
        if name in announced:
            raise PolicyError(
                f"{adapter.where} says that {name} was trained (modules_to_save or bias), but "
                f"{adapter.stored.where} does not have it"
            )
        raise PolicyError(
            f"{adapter.stored.where} has {whole[name]}, which "
            + (
                f"{adapter.where} does not announce (modules_to_save, bias)"
                if name in base.headers
                else f"{base.where} does not have"
            )
        )
    for name, key in whole.items():
        _require_shape(adapter, key, base.headers[name].shape)


def _announced(
    base: StoredTensors, settings: LoraSettings, prefix: str, targeted: list[str]
) -> Iterator[str]:
    for name in base.headers:
        path, _, kind = name.rpartition(".")
        biased = settings.bias == "all" or (settings.bias == "lora_only" and path in targeted)
        if settings.saves(prefix + path) or (kind == "bias" and biased):
            yield name


def _changes(
    base: StoredTensors, adapter: Adapter, prefix: str, path: str, found: Mapping[str, str]
) -> dict[str, Change]:
    """What becomes of the weight and the bias of one module."""
    settings, stored = adapter.settings, adapter.stored
    shape = base.headers[f"{path}.weight"].shape
    rank, scaling = settings.rank(prefix + path), settings.scaling(prefix + path)
    if len(shape) != 2:
        raise PolicyError(
            f"{adapter.where} targets {path}, whose weight has shape {list(shape)}; this version "
            "folds adapters of linears and of the token embedding"
        )
    outputs, inputs = shape
    expected: dict[str, tuple[int, ...]]
    if _ROWS_DOWN in found or _ROWS_UP in found:
        expected = {_ROWS_DOWN: (rank, outputs), _ROWS_UP: (inputs, rank)}
    else:
        expected = {_DOWN: (rank, inputs), _UP: (outputs, rank)}
        if settings.use_dora:
            expected[_LENGTHS] = (outputs,)
        if settings.lora_bias:
            expected[_UP_BIAS] = (outputs,)
    for kind in sorted(expected.keys() ^ found.keys()):
        verb = "has no" if kind in expected else "has an unexpected"
        raise PolicyError(f"{stored.where} {verb} {prefix}{path}.{kind}")
    for kind, needed in expected.items():
        _require_shape(adapter, found[kind], needed)
    if settings.lora_bias and f"{path}.bias" not in base.headers:
        raise PolicyError(f"{adapter.where} has lora_bias, and {path} has no bias to add it to")
    places = {kind: stored.places[key] for kind, key in found.items()}
    if _ROWS_DOWN in places:
        return {f"{path}.weight": Rows(places[_ROWS_DOWN], places[_ROWS_UP], scaling)}
    changes: dict[str, Change] = {
        f"{path}.weight": LowRank(places[_DOWN], places[_UP], scaling, places.get(_LENGTHS))
    }
    if settings.lora_bias:
        changes[f"{path}.bias"] = Added(places[_UP_BIAS], scaling)
    return changes


def _require_shape(adapter: Adapter, key: str, shape: tuple[int, ...]) -> None:
    found: Header = adapter.stored.headers[key]
    if found.shape != shape:
        raise PolicyError(
            f"{adapter.stored.where}: {key} has shape {list(found.shape)}, its base and "
            f"{adapter.where.name} need {list(shape)}"
        )


def _summary(
    base: StoredTensors,
    adapter: Adapter,
    prefix: str,
    targeted: list[str],
    whole: Mapping[str, str],
) -> str:
    settings, paths = adapter.settings, [prefix + path for path in targeted]
    ranks = ", ".join(map(str, sorted({settings.rank(path) for path in paths})))
    strengths = ", ".join(f"{n:g}" for n in sorted({settings.strength(path) for path in paths}))
    replaced = f"; {len(whole)} tensors replaced" if whole else ""
    kind = "DoRA" if settings.use_dora else "LoRA"
    count = "1 module" if len(targeted) == 1 else f"{len(targeted)} modules"
    return (
        f"{kind} of rank {ranks}, alpha {strengths}, folded into {count} in float32 and not "
        f"rounded{replaced}"
    )


@dataclass(frozen=True)
class LowRank:
    """The product of two thin matrices added to a linear's weight, rows brought to a length."""

    down: Place
    up: Place
    scaling: float
    lengths: Place | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """Float32 [N, K] → float32 [N, K]; the weight is used up."""
        weight.addmm_(read_place(self.up), read_place(self.down), alpha=self.scaling)
        if self.lengths is None:
            return weight
        factor = read_place(self.lengths) / torch.linalg.norm(weight, dim=1)
        return weight.mul_(factor.unsqueeze(1))


@dataclass(frozen=True)
class Rows:
    """The product of two thin matrices, transposed, added to an embedding's rows."""

    down: Place
    up: Place
    scaling: float

    def __call__(self, weight: Tensor) -> Tensor:
        """Float32 [V, D] → float32 [V, D]; the weight is used up."""
        return weight.addmm_(read_place(self.down).t(), read_place(self.up).t(), alpha=self.scaling)


@dataclass(frozen=True)
class Added:
    """A scaled tensor added to a bias."""

    place: Place
    scaling: float

    def __call__(self, bias: Tensor) -> Tensor:
        """Float32 [N] → float32 [N]; the bias is used up."""
        return bias.add_(read_place(self.place), alpha=self.scaling)
