"""What an artifact holds, as ``inspect`` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omega_qvla.artifact.directory import read_artifact, read_description
from omega_qvla.artifact.memory import MemorySummary
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.runtime.foreign import part_of_linears
from omega_qvla.runtime.linear import best_kernel
from omega_qvla.runtime.loading import load
from omega_qvla.runtime.memory import memory_report


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


def inspect_artifact(directory: Path, *, directory_bytes: int) -> Inspection:
    """Look into an artifact, every byte checked.

    One of a module of the user's own is shown by what its files say: the module is not needed.

    Args:
        directory: of the artifact.
        directory_bytes: size of all files in it.

    Raises:
        NotAnArtifactError, ArtifactError, ResourceError: see ``load``.
    """
    described, _ = read_description(directory)
    if described["policy"]["family"] != TorchPolicy.family:
        quantized = load(directory)
        memory = quantized.memory_report(directory_bytes=directory_bytes)
        assert quantized.content_hash is not None
        return Inspection(quantized.config, quantized.content_hash, memory, quantized.kernel)
    artifact = read_artifact(directory)
    config = artifact.config
    parts = part_of_linears(config["policy"]["config"])
    memory = memory_report(
        config,
        artifact.tensors,
        lambda name: parts.get(name.rpartition(".")[0], "other"),
        directory_bytes=directory_bytes,
    )
    return Inspection(config, artifact.content_hash, memory, best_kernel())
