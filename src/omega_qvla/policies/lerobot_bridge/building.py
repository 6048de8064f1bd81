"""LeRobot's modules, built from their configuration: with weights from files, or without any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omega_qvla.errors import OmegaError, PolicyError
from omega_qvla.policies.lerobot_bridge.empty import weights_on_meta
from omega_qvla.policies.lerobot_bridge.kinds import KINDS, Backbones, answered
from omega_qvla.policies.lerobot_bridge.library import lerobot

_HERE = {"device": "cpu", "compile_model": False}
"""Settings that say where and how LeRobot computes; what is computed depends on neither."""

_NO_WEIGHTS = {"load_vlm_weights": False, "pretrained_backbone_weights": None}
"""Settings by which LeRobot fetches weights that a checkpoint replaces at once."""


def configuration(content: Mapping[str, Any], **changed: Any) -> Any:
    """LeRobot's configuration of a policy, from its ``config.json``.

    Raises:
        PolicyError: LeRobot does not know a field, or a value.
    """
    lerobot("policies")  # registers the types
    changes = {key: value for key, value in {**_HERE, **changed}.items() if key in content}
    with TemporaryDirectory(prefix="omega-qvla-") as place:
        text = json.dumps({**content, **changes, "device": "cpu"})
        (Path(place) / "config.json").write_text(text)
        try:
            return lerobot("configs").PreTrainedConfig.from_pretrained(place)
        except OmegaError:
            raise
        except Exception as error:
            raise PolicyError(f"LeRobot refuses the policy's config.json: {error}") from error


def build_empty(name: str, content: Mapping[str, Any], backbones: Backbones) -> Any:
    """LeRobot's module of a type, in evaluation mode; its weights have no memory.

    Raises:
        PolicyError: LeRobot cannot build it.
    """
    with ExitStack() as stack:
        if name in KINDS:
            stack.enter_context(answered(KINDS[name], backbones))
        stack.enter_context(weights_on_meta())
        return build_random(name, content)


def build_random(name: str, content: Mapping[str, Any]) -> Any:
    """LeRobot's module of a type, in evaluation mode, with the weights that it draws.

    Raises:
        PolicyError: LeRobot cannot build it.
    """
    config = configuration(content, **_NO_WEIGHTS)
    made_by = lerobot("policies.factory").get_policy_class(name)
    try:
        with redirect_stdout(StringIO()):
            return made_by(config).eval()
    except OmegaError:
        raise
    except Exception as error:
        raise PolicyError(
            f"LeRobot cannot build its {name}: {type(error).__name__}: {error}"
        ) from error
