"""The disk format: what is stored of a site, and directories that are complete or not there."""

from omega_qvla.artifact.directory import (
    Artifact,
    Description,
    VerifyReport,
    planned_bytes,
    preflight,
    read_artifact,
    read_description,
    verify_artifact,
    write_artifact,
)

__all__ = [
    "Artifact",
    "Description",
    "VerifyReport",
    "planned_bytes",
    "preflight",
    "read_artifact",
    "read_description",
    "verify_artifact",
    "write_artifact",
]
