"""The weights of a LeRobot policy: its own file, or a LoRA adapter and the base it belongs to.

A fine-tune by ``lerobot-train --peft`` is a directory with ``config.json`` and the pipelines of the
fine-tune, ``adapter_config.json`` and ``adapter_model.safetensors``.  LeRobot takes everything from
there but the base's weights (``policies/factory.py``, ``make_policy``), and so does this.  Once the
adapter is merged and the whole policy saved, ``config.json`` still says ``use_peft``, and means
nothing by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.hub import fetch, looks_unpinned, parse_hub_id
from omega_qvla.checkpoints.lerobot_pipelines import without_prefix
from omega_qvla.checkpoints.lora import ADAPTER_WEIGHTS, Adapter, fold, has_adapter, read_adapter
from omega_qvla.checkpoints.lora_settings import ADAPTER_CONFIG
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.stored_tensors import (
    WEIGHTS,
    StoredTensors,
    find_tensors,
    has_safetensors,
)
from omega_qvla.errors import PolicyError


def lerobot_tensors(
    directory: Path,
    content: Mapping[str, Any],
    prefix: str,
    options: CheckpointOptions,
    official: Callable[[StoredTensors], StoredTensors],
) -> StoredTensors:
    """The tensors of a LeRobot policy under official names, an adapter folded in when one is read.

    Args:
        directory: the policy directory.
        content: of its ``config.json``.
        prefix: LeRobot's, before official names.
        options: the base of an adapter.
        official: the family's names for tensors that have lost their prefix.

    Raises:
        PolicyError: weights are missing or damaged; an adapter beside whole weights; the base is
            not found or not fixed; the adapter does not fit it; the halves of the tie differ.
        ResourceError: the base is on the hub, which cannot be reached.
    """
    whole = has_safetensors(directory)
    if not has_adapter(directory):
        if options.base is not None:
            raise PolicyError(
                f"--base is for LoRA adapters, and {directory} has no {ADAPTER_CONFIG}"
            )
        stored = official(without_prefix(find_tensors(directory), prefix))
        if not content.get("use_peft"):
            return stored
        merged = "merged: whole weights and no adapter, although config.json says use_peft"
        return replace(stored, decisions={**stored.decisions, "adapter": merged})
    if whole:
        raise PolicyError(
            f"{directory} holds whole weights ({WEIGHTS}) and an adapter ({ADAPTER_WEIGHTS}), and "
            "nothing says whether the adapter is merged into them already. If it is, remove "
            f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; if not, move {WEIGHTS} to a directory of its "
            "own and name that with --base"
        )
    adapter = read_adapter(directory)
    base, name = _base(adapter, options.base)
    if not has_safetensors(base) and has_adapter(base):
        raise PolicyError(f"{base}, the base of {directory}, is an adapter itself; merge it first")
    folded = fold(official(without_prefix(find_tensors(base), prefix)), adapter, prefix)
    summary = f"{folded.decisions['adapter']}; base {name}"
    return replace(folded, decisions={**folded.decisions, "adapter": summary})


def _base(adapter: Adapter, choice: str | None) -> tuple[Path, str]:
    """The directory of the base's weights, and its name for people.

    Raises:
        PolicyError: it is not named, not there, or on the hub without a fixed revision.
        ResourceError: the hub cannot be reached.
    """
    settings = adapter.settings
    name = choice or settings.base_model_name_or_path
    if not name:
        raise PolicyError(
            f"{adapter.where} does not name the base of the adapter: give --base DIR or --base "
            "owner/name@<commit>, in Python CheckpointOptions(base=...)"
        )
    if Path(name).is_dir():
        return Path(name), name
    if choice is None and looks_unpinned(name) and settings.revision:
        name = f"{name}@{settings.revision}"
    identity = parse_hub_id(name)
    if identity is not None:
        return fetch(identity), name
    pin = f" (on the hub: {name}@<commit>)" if looks_unpinned(name) else ""
    raise PolicyError(
        f"{adapter.where}: the base of the adapter is {name!r}, which is no directory here; give "
        f"--base DIR or --base owner/name@<commit>{pin}, in Python CheckpointOptions(base=...)"
    )
