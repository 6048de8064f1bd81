"""What an artifact says of itself: no tensor is read, and the module of a user is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.artifact import Description, read_description
from omega_qvla.artifact.manifest import CONFIG
from omega_qvla.errors import ArtifactError, OmegaError
from omega_qvla.files import Failure
from omega_qvla.policies.base import Policy, QuantizationSite, sites_of
from omega_qvla.policies.full_precision import policy_skeleton
from omega_qvla.policies.torch_module import FOREIGN
from omega_qvla.runtime.description import coverage_faults, require_tensors
from omega_qvla.runtime.foreign import part_of_linears
from omega_qvla.runtime.linear import best_kernel
from omega_qvla.runtime.memory import MemorySummary, memory_report


@dataclass(frozen=True)
class Inspection:
    """An artifact, looked into.

    Attributes:
        config: the content of ``omega_config.json``.
        content_hash: of every byte.
        memory: bytes per component of the whole directory.
        kernel: what multiplies its integers here.
    """

    config: dict[str, Any]
    content_hash: str
    memory: MemorySummary
    kernel: str


def inspect_artifact(directory: Path) -> Inspection:
    """Look into an artifact; of its tensor files the sizes are checked.

    Raises:
        NotAnArtifactError, ArtifactError, ResourceError: it cannot be read, or what it says of
            itself does not fit together.
    """
    found = read_description(directory)
    try:
        memory = memory_report(
            found.config, found.manifest.layout, directory_bytes=found.total_bytes
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{directory}: omega_config.json does not fit the manifest: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Inspection(found.config, found.content_hash, memory, best_kernel())


def site_failures(directory: str | Path) -> list[Failure]:
    """Whether an artifact's sites are what its recipe quantizes of its policy, and their tensors.

    Of a module of the user's own or of LeRobot's it is known which linears were matched; ``load``
    holds them against the module.

    Raises:
        NotAnArtifactError, ArtifactError: its description cannot be read.
    """
    found = read_description(directory)
    try:
        policy, sites = _structure(found)
        faults = coverage_faults(sites, found.config)
        if not faults:
            require_tensors(policy, found.config, found.manifest.layout)
    except ArtifactError as error:
        faults = [str(error)]
    except (KeyError, TypeError, ValueError, AttributeError, OmegaError) as error:
        faults = [f"does not describe a policy: {type(error).__name__}: {error}"]
    return [Failure(CONFIG, None, fault) for fault in faults]


def _structure(found: Description) -> tuple[Policy | None, Sequence[QuantizationSite]]:
    """The policy where it can be built, and its linears as sites."""
    given = found.config["policy"]
    if given["family"] not in FOREIGN:
        policy = policy_skeleton(str(given["family"]), given["config"], found.processor)
        return policy, sites_of(policy)
    parts: dict[str, Any] = part_of_linears(given["config"])
    return None, [
        QuantizationSite(name, (name,), part, per_step=part == "action_head")
        for name, part in parts.items()
    ]
