"""``manifest.json``: what an artifact consists of, to the byte.

    {
      "content_hash": SHA-256 of the canonical JSON of everything else in here,
      "files":   {name: {"sha256": .., "size": ..}},
      "format_version": 1,
      "tensors": {name: {"dtype": .., "file": .., "sha256": .., "shape": [..]}}
    }

Every file of the artifact except the manifest itself is in ``files``; ``content_hash`` protects the
manifest, so that no bit of an artifact is outside some hash.  The hashes find damage and mix-ups.
They are no signature: who can write the directory can make a consistent one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omega_qvla.artifact.strict_json import JsonError, canonical, parse_object
from omega_qvla.artifact.tensors import TensorSpec, parse_spec
from omega_qvla.files import DamageError

FORMAT_VERSION = 1
MANIFEST, CONFIG, CARD, PROCESSOR = "manifest.json", "omega_config.json", "README.md", "processor"
LIMITS = {MANIFEST: 8 << 20, CONFIG: 4 << 20, CARD: 1 << 20}
MAX_PROCESSOR_BYTES = 64 << 20

SHARD_NAME = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors\Z")
PROCESSOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is, what it is, and the SHA-256 of its bytes."""

    file: str
    spec: TensorSpec
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact consists of, by name."""

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @property
    def shards(self) -> list[str]:
        """Tensor files in order."""
        return sorted(name for name in self.files if SHARD_NAME.match(name))

    @property
    def processor(self) -> list[str]:
        """Names of the processor's files, without the folder."""
        prefix = f"{PROCESSOR}/"
        return sorted(name[len(prefix) :] for name in self.files if name.startswith(prefix))

    def tensors_in(self, shard: str) -> dict[str, TensorEntry]:
        """The tensors a file must hold, no more and no fewer."""
        return {name: entry for name, entry in self.tensors.items() if entry.file == shard}

    @property
    def content_hash(self) -> str:
        """Identifies the artifact: equal exactly when every byte is."""
        return hashlib.sha256(canonical(self._content())).hexdigest()

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical({"content_hash": self.content_hash, **self._content()})

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in self.files.items()
            },
            "tensors": {
                name: {
                    "file": entry.file,
                    "dtype": entry.spec.dtype,
                    "shape": list(entry.spec.shape),
                    "sha256": entry.sha256,
                }
                for name, entry in self.tensors.items()
            },
        }


def shard_name(index: int, count: int) -> str:
    """Name of tensor file ``index`` (from 0) of ``count``."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def limit_of(name: str) -> int:
    """The largest size a small file may have."""
    return LIMITS.get(name, MAX_PROCESSOR_BYTES)


def parse_manifest(data: bytes) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        DamageError: not exactly what ``Manifest.to_bytes`` writes.
    """
    try:
        content = parse_object(data)
        _check_version(content)
        _expect_keys(content, {"content_hash", "files", "format_version", "tensors"}, "manifest")
        files = {name: _file(name, e) for name, e in _mapping(content["files"], "files").items()}
        tensors = {
            name: _tensor(name, e) for name, e in _mapping(content["tensors"], "tensors").items()
        }
        manifest = Manifest(files, tensors)
        _check_names(manifest)
    except JsonError as error:
        raise DamageError(MANIFEST, str(error)) from error
    if manifest.to_bytes() != data:
        raise DamageError(MANIFEST, "does not have the content hash it states")
    return manifest


def _check_version(content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise JsonError(f"format_version: expected {FORMAT_VERSION}, found {version!r:.80}")


def _check_names(manifest: Manifest) -> None:
    """Exactly the files of a format-1 artifact; all tensors in its tensor files."""
    shards = manifest.shards
    expected = {CONFIG, CARD, *(shard_name(i, len(shards)) for i in range(len(shards)))}
    expected |= {f"{PROCESSOR}/{name}" for name in manifest.processor if PROCESSOR_NAME.match(name)}
    if not shards:
        raise JsonError("files: lists no tensor file")
    for name in sorted(expected ^ set(manifest.files)):
        verb = "lacks" if name in expected else "has an unexpected name"
        raise JsonError(f"files: {verb} {name[:200]!r}")
    for name, entry in manifest.tensors.items():
        if entry.file not in shards:
            raise JsonError(f"tensors: {name[:200]!r} is in {entry.file[:200]!r}, no tensor file")


def _file(name: str, entry: Any) -> FileEntry:
    fields = _mapping(entry, f"files: {name[:200]!r}")
    _expect_keys(fields, {"size", "sha256"}, f"files: {name[:200]!r}")
    size = fields["size"]
    if type(size) is not int or size < 0:
        raise JsonError(f"files: {name[:200]!r}: size: expected a number of bytes")
    return FileEntry(size, _hash(fields["sha256"], name))


def _tensor(name: str, entry: Any) -> TensorEntry:
    where = f"tensors: {name[:200]!r}"
    fields = _mapping(entry, where)
    _expect_keys(fields, {"dtype", "file", "sha256", "shape"}, where)
    file = fields["file"]
    if not isinstance(file, str):
        raise JsonError(f"{where}: file: expected a name")
    try:
        spec = parse_spec(fields)
    except JsonError as error:
        raise JsonError(f"{where}: {error}") from error
    return TensorEntry(file, spec, _hash(fields["sha256"], name))


def _hash(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _HASH.match(value):
        raise JsonError(f"{name[:200]!r}: sha256: expected 64 hexadecimal digits")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JsonError(f"{where}: expected an object, found {type(value).__name__}")
    return value  # pyright: ignore[reportUnknownVariableType] - JSON keys are strings


def _expect_keys(content: Mapping[str, Any], expected: set[str], where: str) -> None:
    different = sorted(expected ^ set(content))
    if different:
        verb = "missing" if different[0] in expected else "unexpected"
        raise JsonError(f"{where}: {verb} key {different[0][:200]!r}")
