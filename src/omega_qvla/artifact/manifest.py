"""``manifest.json``: what an artifact consists of, to the byte.

    {
      "content_hash": SHA-256 of the canonical JSON of everything else in here,
      "files":   {name: {"sha256": .., "size": ..}},
      "format_version": 1,
      "tensors": {name: {"dtype": .., "file": .., "shape": [..]}}
    }

Every file of the artifact except the manifest itself is in ``files``; ``content_hash`` protects the
manifest, so that no bit of an artifact is outside some hash.  The hashes find damage and mix-ups.
They are no signature: who can write the directory can make a consistent one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from omega_qvla.artifact.layout import Layout, TensorSpec
from omega_qvla.artifact.strict_json import JsonError, canonical, parse_object
from omega_qvla.artifact.tensors import CODES, DTYPES, fits
from omega_qvla.files import DamageError

FORMAT_VERSION = 1
MANIFEST, CONFIG, CARD, PROCESSOR = "manifest.json", "omega_config.json", "README.md", "processor"
LEROBOT = ("config.json", "policy_preprocessor.json", "policy_postprocessor.json")
"""What LeRobot's plug-in reads of an artifact (docs/lerobot.md): all of them, or none."""
LIMITS = {MANIFEST: 8 << 20, CONFIG: 4 << 20, CARD: 1 << 20, **dict.fromkeys(LEROBOT, 1 << 20)}
MAX_PROCESSOR_BYTES = 64 << 20

SHARD_NAME = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors\Z")
PROCESSOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size and SHA-256 of a file."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


class TensorEntry(_Strict):
    """Where a tensor is and what it is; ``dtype`` is a key of ``DTYPES``."""

    file: str
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(DTYPES[self.dtype], tuple(self.shape))


class Manifest(_Strict):
    """Everything an artifact consists of, by name."""

    format_version: Literal[1] = FORMAT_VERSION
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def of(cls, files: Mapping[str, FileEntry], shards: Mapping[str, Layout]) -> Manifest:
        """The manifest of these files, of which the shards hold these tensors."""
        tensors = {
            name: TensorEntry(file=shard, dtype=CODES[spec.dtype], shape=list(spec.shape))
            for shard, specs in shards.items()
            for name, spec in specs.items()
        }
        return cls(files=files, tensors=tensors)

    @property
    def layout(self) -> Layout:
        """Every tensor by name."""
        return {name: entry.spec for name, entry in self.tensors.items()}

    @property
    def shards(self) -> dict[str, Layout]:
        """Tensor files in order, each with what it must hold, no more and no fewer."""
        found: dict[str, Layout] = {n: {} for n in sorted(self.files) if SHARD_NAME.match(n)}
        for name, entry in self.tensors.items():
            found[entry.file][name] = entry.spec
        return found

    @property
    def small(self) -> list[str]:
        """The other files in order."""
        return sorted(name for name in self.files if not SHARD_NAME.match(name))

    @property
    def content_hash(self) -> str:
        """Identifies the artifact: equal exactly when every byte is."""
        return hashlib.sha256(canonical(self.model_dump())).hexdigest()

    def to_bytes(self) -> bytes:
        """The file."""
        return canonical({"content_hash": self.content_hash, **self.model_dump()})


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
        content.pop("content_hash", None)
        manifest = Manifest.model_validate(content)
        _check_names(manifest)
    except ValidationError as error:
        raise DamageError(MANIFEST, _first(error)) from error
    except JsonError as error:
        raise DamageError(MANIFEST, str(error)) from error
    if manifest.to_bytes() != data:
        raise DamageError(MANIFEST, "does not have the content hash it states")
    return manifest


def _first(error: ValidationError) -> str:
    """The first thing wrong: where, what, and what was found."""
    item: Any = error.errors(include_url=False)[0]
    where = ": ".join(ascii(part)[:200] for part in item["loc"])
    return f"{where}: {item['msg']}, found {item['input']!r:.80}"


def _check_names(manifest: Manifest) -> None:
    """Exactly the files of a format-1 artifact; all tensors in its tensor files."""
    names = manifest.files.keys()
    count = sum(SHARD_NAME.match(name) is not None for name in names)
    expected = {CONFIG, CARD, *(shard_name(i, count) for i in range(count))}
    if names & set(LEROBOT):
        expected |= set(LEROBOT)
    prefix = f"{PROCESSOR}/"
    expected |= {
        name
        for name in names
        if name.startswith(prefix) and PROCESSOR_NAME.match(name.removeprefix(prefix))
    }
    if not count:
        raise JsonError("files: lists no tensor file")
    for name in sorted(expected ^ names):
        verb = "lacks" if name in expected else "has an unexpected name"
        raise JsonError(f"files: {verb} {name[:200]!r}")
    for name, entry in manifest.tensors.items():
        where = f"tensors: {name[:200]!r}"
        if not SHARD_NAME.match(entry.file) or entry.file not in names:
            raise JsonError(f"{where} is in {entry.file[:200]!r}, no tensor file")
        if entry.dtype not in DTYPES:
            raise JsonError(f"{where}: dtype: expected one of {', '.join(DTYPES)}")
        if not fits(entry.shape):
            raise JsonError(f"{where}: shape: too many extents or items")
