"""openpi's PyTorch layout: ``model.safetensors`` and ``assets/<id>/norm_stats.json``.

openpi keeps most of a policy in its training code.  Sizes come from the tensors (``sizes.py``), the
rest from the training configuration that the user names (``openpi_training.py``).  A
``config.json`` of openpi's converter must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import read_bytes
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.checkpoints.orbax import is_orbax
from omega_qvla.checkpoints.stored_tensors import StoredTensors, find_tensors, has_safetensors
from omega_qvla.errors import PolicyError
from omega_qvla.policies.layers.siglip_checkpoints import official_names
from omega_qvla.policies.paligemma.config import PaligemmaConfig
from omega_qvla.policies.paligemma.names import TOWER
from omega_qvla.policies.paligemma.openpi_training import TrainingConfig
from omega_qvla.policies.paligemma.sizes import TIE, Sizes
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.relative_actions import describe_actions

CONFIG, STATISTICS = "config.json", "norm_stats.json"
STATE_TOKEN = "state_proj.weight"
"""What a network with a token for the state has."""


def is_openpi_layout(directory: Path, content: Mapping[str, Any] | None, family: str) -> bool:
    """Whether a directory is openpi's, whatever network it holds.

    Args:
        directory: the policy directory.
        content: of its ``config.json``; None without one.
        family: named by a ``config.json`` that this project wrote in openpi's layout.
    """
    if content is None:
        return has_safetensors(directory) or not is_orbax(directory)
    if content.get("family", family) != family:
        return False
    return "paligemma_variant" in content or (directory / "assets").exists()


def has_state_token(directory: Path) -> bool:
    """Whether the network of a directory has a token for the state.

    Raises:
        PolicyError: there are none, or they are damaged.
    """
    return STATE_TOKEN in find_tensors(directory).headers


def openpi_tensors(directory: Path, options: CheckpointOptions) -> StoredTensors:
    """The tensors under the module's names.

    Raises:
        PolicyError: there are none, they are damaged, or the halves of the tie differ.
    """
    return official_names(find_tensors(directory), TOWER, TIE, options.tied)


def require_agreement(
    directory: Path,
    content: Mapping[str, Any],
    training: TrainingConfig,
    sizes: Sizes,
    options: CheckpointOptions,
) -> None:
    """What openpi's converter wrote must be what the training configuration says.

    Args:
        directory: the policy directory.
        content: of ``config.json``; empty where there is none.
        training, sizes: of the policy.
        options: name the training configuration.

    Raises:
        PolicyError: it is not.
    """
    for key, ours in (("action_horizon", training.horizon), ("action_dim", sizes.action_dim)):
        if content.get(key, ours) != ours:
            raise PolicyError(
                f"{directory / CONFIG} has {key} {content[key]}, the training configuration "
                f"{options.training_config} and the tensors say {ours}: it is another policy's"
            )


def published_fields(training: TrainingConfig, sizes: Sizes) -> dict[str, Any]:
    """The fields of ``PaligemmaConfig`` that tensors and training configuration tell.

    Raises:
        PolicyError: the two do not go together.
    """
    if training.robot_action_dim > sizes.action_dim:
        raise PolicyError(
            f"the training configuration has a robot of {training.robot_action_dim} numbers per "
            f"action (robot_action_dim), the weights (action_out_proj) give {sizes.action_dim}: it "
            "is another policy's"
        )
    return {
        **sizes._asdict(),
        "horizon": training.horizon,
        "robot_action_dim": training.robot_action_dim,
        "state_dim": training.state_dim,
        "cameras": training.cameras,
        "image_fit": "antialiased",
        "relative_actions": training.relative_actions,
        "robot": training.robot,
    }


def published_decisions(
    layout: str, config: PaligemmaConfig, state: str, options: CheckpointOptions
) -> dict[str, str]:
    """What the user's training configuration says of how the policy is shown the world.

    Args:
        layout: what is read.
        config: of the policy.
        state: where the state goes.
        options: name the training configuration.
    """
    robot = config.robot
    units = "ALOHA's joints and grippers, converted" if robot.adapt_to_pi else "the robot's"
    return {
        "layout": layout,
        "training configuration": str(options.training_config),
        "state in the prompt": state,
        "images": "padded to a square with -1 (black)",
        "cameras": ", ".join(config.cameras),
        "actions": describe_actions(config.relative_actions, None),
        "units of state and actions": units,
        "robot's observations": robot.layout or "under the policy's own names",
        **({"default prompt": robot.default_prompt} if robot.default_prompt else {}),
    }


def read_statistics(
    directory: Path,
    asset_id: str | None,
    parse: Callable[[bytes, str], NormalizationStatistics],
) -> NormalizationStatistics:
    """The statistics of the named robot, or the only ones there are where none is named.

    Args:
        directory: the policy directory.
        asset_id: folder of the robot's statistics below ``assets``.
        parse: content of a file and its name → those the policy uses.

    Raises:
        PolicyError: the named robot's are not there, or there are several and none is named.
    """
    assets = directory / "assets"
    found = {
        path.parent.relative_to(assets).as_posix(): path.relative_to(directory).as_posix()
        for path in sorted(assets.rglob(STATISTICS))
    }
    there = ", ".join(found) or "none"
    if asset_id is not None and asset_id not in found:
        raise PolicyError(
            f"{assets} has no {asset_id}/{STATISTICS}, the statistics that the training "
            f"configuration names (asset_id); it has those of: {there}. If the policy was trained "
            "with those, give a training configuration of your own, a JSON file with that asset_id"
        )
    if asset_id is None and len(found) != 1:
        raise PolicyError(
            f"{assets} must hold exactly one */{STATISTICS}, found {len(found)}: {there}"
        )
    name = found[next(iter(found)) if asset_id is None else asset_id]
    return parse(read_bytes(directory, name), str(directory / name))
