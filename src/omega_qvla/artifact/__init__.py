"""The disk format: packing of 4-bit integers, and directories that are complete or not there."""

from omega_qvla.artifact.directory import (
    Artifact,
    VerifyReport,
    planned_bytes,
    preflight,
    read_artifact,
    verify_artifact,
    write_artifact,
)
from omega_qvla.artifact.memory import ComponentMemory, MemorySummary, summarise
from omega_qvla.artifact.packing import pack_int4, packed_width, unpack_int4
from omega_qvla.files import Failure, preflight_disk

__all__ = [
    "Artifact",
    "ComponentMemory",
    "Failure",
    "MemorySummary",
    "VerifyReport",
    "pack_int4",
    "packed_width",
    "planned_bytes",
    "preflight",
    "preflight_disk",
    "read_artifact",
    "summarise",
    "unpack_int4",
    "verify_artifact",
    "write_artifact",
]
