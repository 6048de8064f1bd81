"""Bytes of whole policies: on disk and resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omega_qvla.evaluation.execution.blueprint import Footprint
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy


def full_footprint(policy: Any, checkpoint_bytes: int | None) -> Footprint:
    """Bytes of a full-precision policy."""
    return Footprint(checkpoint_bytes, sum(p.nbytes for p in policy.module.parameters()))


def artifact_footprint(
    policy: QuantizedPolicy | SimulatedPolicy, directory: Path | None
) -> Footprint:
    """Bytes of a quantized policy; a simulation has no directory."""
    on_disk = None if directory is None else directory_bytes(directory)
    return Footprint(on_disk, policy.resident_bytes())


def directory_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
