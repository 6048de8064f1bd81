"""Which layout a policy directory has, told by its ``config.json``, and the reader for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import read_json, refuse_unsafe
from omega_qvla.checkpoints.lora import ADAPTER_CONFIG, has_adapter
from omega_qvla.checkpoints.options import Choices
from omega_qvla.checkpoints.stored_tensors import INDEX, WEIGHTS
from omega_qvla.errors import PolicyError
from omega_qvla.policies.gr00t_n15.checkpoints.isaac import stream_gr00t
from omega_qvla.policies.gr00t_n15.checkpoints.lerobot import stream_lerobot_groot
from omega_qvla.policies.gr00t_n15.policy import Gr00tN15Policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.neighbours import (
    lerobot_type_message,
    refuse_gr00t,
    refuse_lerobot_n1_7,
)
from omega_qvla.policies.own_layout import stream_own
from omega_qvla.policies.pi05.checkpoints.lerobot import stream_lerobot_pi05
from omega_qvla.policies.pi05.checkpoints.openpi import CONFIG, stream_openpi

READ = "openpi, LeRobot (pi05, groot), GR00T N1.5 and this project's own"


Reader = Callable[[Path, Choices], NativePolicy]
"""A directory, and what it leaves open → its policy, the weights left in the files."""

LEROBOT: dict[str, Reader] = {"pi05": stream_lerobot_pi05, "groot": stream_lerobot_groot}
"""LeRobot's policy types."""

LAYOUTS: dict[Reader, tuple[str, frozenset[str]]] = {
    stream_openpi: (
        "openpi's (there is no config.json that names another)",
        frozenset({"training_config", "tokenizer", "tied"}),
    ),
    stream_lerobot_pi05: (
        "LeRobot's pi05",
        frozenset({"tokenizer", "written_by", "ignore_settings", "base", "tied"}),
    ),
    stream_lerobot_groot: (
        "LeRobot's groot",
        frozenset({"tokenizer", "embodiment", "ignore_settings", "base", "tied"}),
    ),
    stream_gr00t: (
        "Isaac-GR00T's",
        frozenset({"tokenizer", "embodiment", "data_config", "tied"}),
    ),
    stream_own: ("this project's own", frozenset({"embodiment"})),
}
"""What a user knows each layout as, and the fields of ``Choices`` that its reader reads."""


def require_asked(reader: Reader, choices: Choices, where: str) -> None:
    """Refuse an answer to what a checkpoint does not ask: it is meant for another one.

    Raises:
        PolicyError: an answer was given that this layout has no use for.
    """
    layout, asked = LAYOUTS[reader]
    given = [f.name for f in fields(choices) if getattr(choices, f.name) != f.default]
    unasked = [f"--{name.replace('_', '-')}" for name in given if name not in asked]
    if unasked:
        raise PolicyError(
            f"the layout of {where} is {layout}, which has no use for {', '.join(unasked)}: leave "
            "it out, or give the checkpoint it is meant for"
        )


def reader_for(directory: Path) -> Reader:
    """The reader of a policy directory.

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
    if content is not None:
        return _by_config(directory, content)
    if not any((directory / name).exists() for name in (WEIGHTS, INDEX, "assets")):
        refuse_unsafe(directory)
        raise PolicyError(
            f"{str(directory)!r} has no {CONFIG} and no {WEIGHTS}: it is not a policy directory "
            f"this version reads ({READ}; docs/checkpoints.md)"
        )
    return stream_openpi


def _by_config(directory: Path, content: dict[str, Any]) -> Reader:
    where = directory / CONFIG
    if "type" in content:
        kind = content["type"]
        if not isinstance(kind, str) or kind not in LEROBOT:
            raise PolicyError(lerobot_type_message(kind, where, ", ".join(LEROBOT)))
        if kind == "groot":
            refuse_lerobot_n1_7(content, where)
        return LEROBOT[kind]
    if content.get("family") == Gr00tN15Policy.family:
        return stream_own
    if "family" in content or "vision" in content or "paligemma_variant" in content:
        return stream_openpi
    refuse_gr00t(content, where)
    if str(content.get("model_type", "")).startswith("gr00t"):
        return stream_gr00t
    raise PolicyError(
        f"{where} is of no layout this version reads ({READ}; docs/checkpoints.md): it has neither "
        "LeRobot's 'type' nor openpi's 'paligemma_variant' nor GR00T's 'model_type'"
    )
