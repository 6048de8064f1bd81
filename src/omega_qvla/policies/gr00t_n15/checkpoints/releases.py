"""The other releases of GR00T, which look like N1.5 in a checkpoint and are other networks.

``config.json`` of an Isaac-GR00T release names it in ``model_type``: ``gr00t_n1``, ``gr00t_n1_5``,
``Gr00tN1d6``, ``Gr00tN1d7``.  LeRobot's ``type`` is ``groot`` for both the releases it has read:
N1.5 up to 0.5.1, N1.7 from 0.6.0 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.errors import PolicyError
from omega_qvla.policies.torch_module import AS_MODULE

_NOT_BUILT = "which is another network than N1.5, the one that this version builds"

_GR00T = {
    "gr00t_n1": ("GR00T N1", "", "Isaac-GR00T's N1 release reads it"),
    "gr00tn1d6": (
        "GR00T N1.6",
        " (its Eagle is another, and its action head has 32 layers for 16)",
        "Isaac-GR00T's N1.6 release reads it, and no release of LeRobot does",
    ),
    "gr00tn1d7": (
        "GR00T N1.7",
        " (it sees through Cosmos-Reason2, a Qwen3-VL, in place of Eagle)",
        "Isaac-GR00T's N1.7 release reads it, and LeRobot from 0.6.0 on: load it there as groot's "
        "base_model_path, and what save_pretrained writes is a policy of LeRobot, which is run and "
        "quantized by LeRobot's own module",
    ),
}
"""``model_type`` or architecture in lower case → its name, what is other than in N1.5, and what
reads it."""


def is_gr00t(directory: Path, content: Mapping[str, Any] | None) -> bool:
    """Whether Isaac-GR00T saved a directory, in whatever release."""
    return any(kind.startswith("gr00t") for kind in _kinds(content or {}))


def refuse_others(content: Mapping[str, Any], where: Path) -> None:
    """Refuse the other releases of GR00T, as Isaac-GR00T saves them.

    Raises:
        PolicyError: ``config.json`` is of one.
    """
    for kind in _kinds(content):
        for start, (name, other, reader) in _GR00T.items():
            if kind == start or (start != "gr00t_n1" and kind.startswith(start)):
                raise PolicyError(
                    f"{where} is of {name}, {_NOT_BUILT}{other}. {reader}; {AS_MODULE}"
                )


def is_lerobot_n1_7(content: Mapping[str, Any]) -> bool:
    """Whether LeRobot's ``groot`` is GR00T N1.7.

    N1.5 was saved with the repository of its tokenizer, which LeRobot refuses from 0.6.0 on.
    """
    return content.get("tokenizer_assets_repo") is None and "tokenizer_assets_repo" in content


def refuse_lerobot_n1_7(content: Mapping[str, Any], where: Path) -> None:
    """Refuse LeRobot's ``groot`` where it is GR00T N1.7.

    Raises:
        PolicyError: it is.
    """
    if is_lerobot_n1_7(content):
        _, other, _ = _GR00T["gr00tn1d7"]
        raise PolicyError(
            f"{where} is LeRobot's groot of GR00T N1.7 (LeRobot 0.6.0 or later), "
            f"{_NOT_BUILT}{other}. LeRobot from 0.6.0 on reads it; {AS_MODULE}"
        )


def _kinds(content: Mapping[str, Any]) -> list[str]:
    """What a configuration calls itself, in lower case."""
    architectures = content.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return [str(kind).lower() for kind in (content.get("model_type"), *named) if kind]
