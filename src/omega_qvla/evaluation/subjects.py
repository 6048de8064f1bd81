"""What the user names: a policy or an artifact as a row, its bytes, the observations it brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omega_qvla.calibration.mismatch import examine
from omega_qvla.calibration.observations import Observations
from omega_qvla.checkpoints.options import CheckpointOptions
from omega_qvla.errors import PolicyError, UsageError
from omega_qvla.evaluation.execution.blueprint import Built, Footprint
from omega_qvla.evaluation.execution.building import artifact_blueprint, full_blueprint
from omega_qvla.evaluation.execution.plan import SweepRow
from omega_qvla.evaluation.footprints import artifact_footprint
from omega_qvla.evaluation.outlier_injection import condition_name, outlier_injected
from omega_qvla.policies.base import Policy
from omega_qvla.policies.full_precision import builtin_directory, load_policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.quantization.pipeline import weights_fingerprint
from omega_qvla.runtime.load import load

Say = Callable[[str], None]
"""Told what is found and decided on the way, a line at a time."""
REFERENCE = "fp32"
"""What rows of full precision are called."""


def policy_row(
    source: str, stress: float, choices: CheckpointOptions
) -> tuple[SweepRow, int, Policy]:
    """One row for a full-precision policy or an artifact, its bytes in memory, and the policy."""
    directory = Path(source)
    if (directory / "omega_config.json").exists():
        if stress:
            raise PolicyError(
                "outliers are injected into a full-precision policy, before quantization; "
                f"{source} is an artifact"
            )
        artifact: Any = load(directory)
        resident = artifact.resident_bytes()
        built = Built(artifact, artifact_footprint(artifact, directory))
        row = SweepRow(
            source,
            artifact.config["recipe"]["name"],
            lambda _: built,
            alone=True,
            blueprint=artifact_blueprint(directory, artifact.content_hash),
        )
        return row, resident, artifact.policy
    policy = load_policy(source, choices)
    blueprint = full_blueprint(
        source,
        choices,
        weights_fingerprint(policy),
        stress,
        seed=0,
        probe=None,
        checkpoint_bytes=checkpoint_bytes(source),
    )
    row = SweepRow(
        source,
        REFERENCE,
        partial(blueprint.build, loaded=lambda: outlier_injected(policy, stress)),
        condition_name(stress),
        blueprint=blueprint,
    )
    return row, resident_bytes(policy), policy


def policy_in_memory(policy: Any) -> tuple[SweepRow, int]:
    """One row for a policy that only this process has, and its bytes in memory, if it tells."""
    config: Mapping[str, Any] = getattr(policy, "config", {}) or {}
    recipe = config.get("recipe", {}) if isinstance(config, Mapping) else {}
    resident = policy.resident_bytes() if hasattr(policy, "resident_bytes") else None
    built = Built(policy, Footprint(None, resident))
    label = str(getattr(policy, "family", type(policy).__name__))
    row = SweepRow(label, recipe.get("name", REFERENCE), lambda _: built, alone=True)
    return row, resident or 0


def identity_of(row: SweepRow) -> str:
    """What fixes the weights of a policy's row: their fingerprint, or the artifact's hash.

    Raises:
        UsageError: it is a policy in memory, which nobody could name again.
    """
    if row.blueprint is None:
        raise UsageError("episodes of a policy in memory cannot be kept: leave `out` away")
    arguments = row.blueprint.arguments
    return str(arguments.get("weights") or arguments.get("content_hash"))


def admit(
    policy: NativePolicy, observations: Observations, limit: int, *, allow: bool, say: Say
) -> None:
    """Say how observations compare with the policy's training.

    Args:
        limit: how many of them are looked at.
        allow: go on with those that are mostly unlike it.

    Raises:
        ObservationError: they are mostly unlike it, and that was not allowed.
    """
    found = examine(policy, observations, limit)
    if found.facts:
        say(found.facts)
    for text in found.admit(allow=allow):
        say(f"warning  {text}")


def default_calibration(policy: str) -> str:
    """The observations that a policy brings.

    Raises:
        PolicyError: it brings none.
    """
    if policy.startswith("builtin:"):
        return policy
    raise PolicyError(
        f"{policy} brings no calibration data; give some as `calibration` (a LeRobot dataset or "
        "FILE.npz, or random:8 to measure speed and memory only); in Python, observations"
    )


def checkpoint_bytes(source: str) -> int | None:
    """Size of a local policy's weights, in one file or in shards."""
    scheme, _, name = source.partition(":")
    directory = builtin_directory(name) if scheme == "builtin" else Path(source)
    sizes = [path.stat().st_size for path in directory.glob("model*.safetensors")]
    return sum(sizes) if sizes else None


def resident_bytes(policy: NativePolicy) -> int:
    """Of its parameters, in memory."""
    return sum(parameter.nbytes for parameter in policy.module.parameters())
