"""``load_policy``: a full-precision policy, of a native family or run by LeRobot's own code."""

from __future__ import annotations

from pathlib import Path

from omega_qvla.checkpoints.files import read_json
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.policies import full_precision
from omega_qvla.policies.full_precision import policy_directory
from omega_qvla.policies.layouts import LEROBOT, require_asked, run_by_lerobot
from omega_qvla.policies.lerobot_bridge.policy import LeRobotPolicy
from omega_qvla.policies.lerobot_bridge.reading import CONFIG, read_lerobot
from omega_qvla.policies.native import NativePolicy


def load_policy(
    source: str | Path, options: CheckpointOptions | None = None
) -> NativePolicy | LeRobotPolicy:
    """Load a full-precision policy.

    Args:
        source: ``builtin:`` or ``random:`` and a name; a directory in the layout of openpi, LeRobot
            or GR00T; or such a directory on the hub, ``owner/name@revision`` (docs/checkpoints.md).
            A type of LeRobot's that has no engine here is run by LeRobot's own code, which has to
            be installed (docs/lerobot.md).
        options: answers to what the checkpoint does not say.

    Raises:
        PolicyError: unknown name, not a policy directory, weights that do not fit, or something
            the checkpoint does not say.
        ResourceError: not enough memory for a random policy of that size; a library is missing;
            the hub cannot be reached.
    """
    bridged = _bridged(source, options)
    return full_precision.load_policy(source, options) if bridged is None else bridged


def stream_policy(
    source: str | Path, options: CheckpointOptions | None = None
) -> NativePolicy | LeRobotPolicy:
    """The policy ``load_policy`` loads; the weights of a native one are read layer by layer.

    Raises:
        PolicyError, ResourceError: as ``load_policy``.
    """
    bridged = _bridged(source, options)
    return full_precision.stream_policy(source, options) if bridged is None else bridged


def _bridged(source: str | Path, options: CheckpointOptions | None) -> LeRobotPolicy | None:
    """The policy that LeRobot runs; None where the source is of a native family, or of nothing."""
    if str(source).partition(":")[0] in ("builtin", "random"):
        return None
    directory = policy_directory(source)
    if (directory / "omega_config.json").exists() or not (directory / CONFIG).exists():
        return None
    if not run_by_lerobot(read_json(directory, CONFIG)):
        return None
    require_asked(LEROBOT, options or CheckpointOptions(), str(directory))
    return read_lerobot(directory)
