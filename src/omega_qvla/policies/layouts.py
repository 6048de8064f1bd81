"""Which layout a policy directory has, told by its ``config.json``, and the reader for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import read_json, refuse_unsafe
from omega_qvla.checkpoints.lora import has_adapter
from omega_qvla.checkpoints.lora_settings import ADAPTER_CONFIG
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import array_paths, is_orbax, require_finished
from omega_qvla.checkpoints.stored_tensors import WEIGHTS, has_safetensors
from omega_qvla.errors import PolicyError
from omega_qvla.policies.families import families
from omega_qvla.policies.family import CheckpointLayout
from omega_qvla.policies.lerobot_bridge.kinds import run_where
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.own_layout import CONFIG, stream_own


def _not_here(directory: Path, options: CheckpointOptions) -> NativePolicy:
    del options
    raise PolicyError(f"{directory} has no engine here")


OWN = CheckpointLayout("this project's own", stream_own, frozenset({"embodiment"}))

LEROBOT = CheckpointLayout("LeRobot's, run by its own code", _not_here, frozenset())

_JAX_ARRAYS = {"PaliGemma/llm/embedder/input_embedding": "pi0-FAST, or PaliGemma alone"}
"""An array of a JAX checkpoint → what has it."""

_SHOWN = 4


def require_asked(layout: CheckpointLayout, options: CheckpointOptions, where: str) -> None:
    """Refuse an answer to what a checkpoint does not ask: it is meant for another one.

    Raises:
        PolicyError: an answer was given that this layout has no use for.
    """
    given = [f.name for f in fields(options) if getattr(options, f.name) != f.default]
    unasked = [f"--{name.replace('_', '-')}" for name in given if name not in layout.options]
    if unasked:
        raise PolicyError(
            f"the layout of {where} is {layout.title}, which has no use for {', '.join(unasked)}: "
            "leave it out, or give the checkpoint it is meant for"
        )


def layout_of(directory: Path) -> CheckpointLayout:
    """The layout of a policy directory.

    Raises:
        PolicyError: it is a quantized artifact, no policy, or one of a family that is not read.
    """
    if (directory / "omega_config.json").exists():
        raise PolicyError(
            f"{str(directory)!r} is a quantized artifact; load it with omega_qvla.load, or give "
            "the full-precision checkpoint it was made from"
        )
    content = read_json(directory, CONFIG) if (directory / CONFIG).exists() else None
    if has_adapter(directory) and "type" not in (content or {}):
        raise PolicyError(
            f"{str(directory)!r} holds a peft adapter ({ADAPTER_CONFIG}) and no LeRobot {CONFIG}: "
            "this version folds the adapters of LeRobot's policies; merge this one where it was "
            "trained (peft's merge_and_unload) and save the whole policy without it"
        )
    weights = has_safetensors(directory)
    # With both, openpi too reads the safetensors.
    if content is None and not weights and is_orbax(directory):
        return _jax(directory)
    if content is None and not weights and not (directory / "assets").exists():
        refuse_unsafe(directory)
        raise PolicyError(
            f"{str(directory)!r} has no {CONFIG} and no {WEIGHTS}: it is not a policy directory "
            f"this version reads ({_read()}; docs/checkpoints.md)"
        )
    if content is not None and "type" in content:
        return _lerobot(content["type"], directory / CONFIG)
    for layout in _layouts():
        if layout.recognizes(directory, content):
            return layout
    if content is not None and "family" in content:
        return OWN
    raise PolicyError(
        f"{directory / CONFIG} is of no layout this version reads ({_read()}; "
        "docs/checkpoints.md): it has neither LeRobot's 'type' nor openpi's 'paligemma_variant' "
        "nor GR00T's 'model_type'"
    )


def _jax(directory: Path) -> CheckpointLayout:
    """The layout of a step that Orbax saved.

    Raises:
        PolicyError: it was not finished, is no step, or is no policy that this version reads.
    """
    require_finished(directory)
    for layout in _layouts():
        if layout.recognizes(directory, None):
            return layout
    names = array_paths(directory)
    kind = next((kind for name, kind in _JAX_ARRAYS.items() if name in names), None)
    known = "" if kind is None else f" ({kind})"
    raise PolicyError(
        f"{directory} is a JAX checkpoint of no policy this version reads{known}; its arrays are "
        f"{', '.join(list(names)[:_SHOWN])}.. It reads {_read()} (docs/checkpoints.md)"
    )


def _layouts() -> Iterator[CheckpointLayout]:
    for family in families().values():
        yield from family.layouts


def _read() -> str:
    """The layouts that are read, for errors."""
    return ", ".join(each.title.partition(" (")[0] for each in (*_layouts(), OWN))


def _lerobot(kind: object, where: Path) -> CheckpointLayout:
    """The layout of a LeRobot ``type``.

    Raises:
        PolicyError: it is not read; says what can be done with it.
    """
    known = _lerobot_types()
    if isinstance(kind, str) and kind in known:
        return known[kind]
    raise PolicyError(
        f"{where} is a LeRobot policy of type {kind!r}, which this command does not run: it is for "
        f"those with an engine here, {', '.join(known)}. {run_where(str(kind))}"
    )


def run_by_lerobot(content: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a LeRobot policy that has no engine here."""
    kind = content.get("type")
    if not isinstance(kind, str):
        return False
    layout = _lerobot_types().get(kind)
    return layout is None or not layout.reads(content)


def _lerobot_types() -> dict[str, CheckpointLayout]:
    return {layout.lerobot_type: layout for layout in _layouts() if layout.lerobot_type}
