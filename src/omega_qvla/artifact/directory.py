"""The only format policies are saved in: one directory, complete, checked and contained.

    omega_config.json                  what the policy is, how it was quantized, "format_version": 1
    model-00001-of-0000N.safetensors   tensors (``shards.py``)
    manifest.json                      size and SHA-256 of every file and tensor (``manifest.py``)
    processor/*                        statistics and tokenizer, as opaque files
    README.md                          the model card

``write_artifact`` builds the directory beside its destination and swaps it in when all of it is on
the disk (``files.py``); equal inputs give equal bytes.  ``read_artifact`` accepts exactly what
``write_artifact`` writes: every file and tensor of the manifest and nothing else, each of its
shape, dtype and hash, no NaN.  ``verify_artifact`` makes the same checks, hashes every tensor as
well as every file, and lists all it finds instead of stopping.  Nothing here executes what it
reads.

Both read files in pieces of 1 MiB; tensors are mapped, not copied.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omega_qvla.artifact.manifest import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    PROCESSOR,
    PROCESSOR_NAME,
    SHARD_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    limit_of,
    parse_manifest,
    shard_name,
)
from omega_qvla.artifact.strict_json import JsonError, canonical, parse_object
from omega_qvla.artifact.tensors import (
    DTYPES,
    Span,
    TensorSpec,
    assign_shards,
    file_digest,
    find_impossible,
    header_bytes,
    map_tensors,
    read_header,
    spec_of,
    tensor_digest,
    write_shard,
)
from omega_qvla.claims import Claim
from omega_qvla.errors import ArtifactError, NotAnArtifactError, ResourceError
from omega_qvla.files import (
    ContainedDirectory,
    DamageError,
    Failure,
    NewFile,
    OpenFile,
    describe,
    preflight_disk,
    replace_directory,
)

MAX_SHARD_BYTES = 256 << 20
_HASHING_THREADS = 2
_BLOCK = 4096  # files take whole blocks
_WRONG_HASH = "its bytes do not have the SHA-256 of the manifest"


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact.

    Attributes:
        config: ``omega_config.json``.
        tensors: by name; private mappings of the files, so nothing is copied until it is used.
        processor: files of ``processor/`` by name.
        content_hash: identifies every byte of the artifact.
        root: the directory.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    processor: dict[str, bytes]
    content_hash: str
    root: Path


@dataclass(frozen=True)
class VerifyReport:
    """What ``verify_artifact`` found.

    Attributes:
        checked: number of files and tensors looked at.
        failures: everything wrong, in the order of the files.
    """

    checked: int
    failures: list[Failure] = field(default_factory=list[Failure])

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The result of ``omega-qvla verify --json``."""
        failures = [asdict(failure) for failure in self.failures]
        return {"ok": self.ok, "checked": self.checked, "failures": failures}


# --- writing ---------------------------------------------------------------------------------


def write_artifact(
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    processor: Mapping[str, bytes],
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    claim: Claim | None = None,
) -> str:
    """Save an artifact; an earlier one is replaced only when the new one is complete.

    Args:
        directory: destination: new, empty, or an earlier artifact.
        config: JSON content of ``omega_config.json``; ``format_version`` is added.
        tensors: dense tensors on any device, by name.
        processor: file name → bytes, for ``processor/``.
        card: text of ``README.md``.
        max_shard_bytes: tensor files are cut so that none is larger, unless one tensor is.
        claim: on the destination, where the caller has it; taken for the time of writing otherwise.

    Returns:
        The content hash.

    Raises:
        OutputError: another process or thread is writing there.
        ArtifactError: something that an artifact cannot hold.
        NotAnArtifactError: the destination holds something else; it is not touched.
        NonFiniteError: a tensor holds NaN or Inf; names it.
        ResourceError: not enough disk, or it cannot be written.
    """
    try:
        target = Path(os.path.realpath(directory))
    except ValueError as error:
        raise NotAnArtifactError(f"{os.fspath(directory)!r} is not a path: {error}") from error
    _check_replaceable(target)
    small = _small_files(config, processor, card)
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    plan = assign_shards(specs, max_shard_bytes)
    shards = {shard_name(i, len(plan)): names for i, names in enumerate(plan)}
    preflight_disk(target, _disk_bytes(small, shards, specs))
    with Claim(target) if claim is None else nullcontext(), replace_directory(target) as work:
        manifest = _write_tree(work, small, shards, specs, tensors)
    return manifest.content_hash


def planned_bytes(
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    processor: Mapping[str, bytes],
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Bytes of the files that ``write_artifact`` would write, from dtypes and shapes alone.

    Args:
        config, processor, card, max_shard_bytes: as for ``write_artifact``.
        tensors: dtype and shape by name.

    Raises:
        ArtifactError: something that an artifact cannot hold.
    """
    small = _small_files(config, processor, card)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    specs = {name: TensorSpec(codes[dtype], shape) for name, (dtype, shape) in tensors.items()}
    plan = assign_shards(specs, max_shard_bytes)
    shards = {shard_name(i, len(plan)): names for i, names in enumerate(plan)}
    return sum(_sizes(small, shards, specs).values())


def preflight(directory: str | os.PathLike[str], needed: int) -> None:
    """Refuse before hours of work what could not be saved after them.

    Args:
        directory: where the artifact will go.
        needed: bytes it will take; the journal kept meanwhile takes about as many again.

    Raises:
        NotAnArtifactError: the directory holds something that is not an artifact.
        ResourceError: the disk has less than twice ``needed`` bytes.
    """
    _check_replaceable(Path(directory))
    preflight_disk(directory, 2 * needed)


def _check_replaceable(target: Path) -> None:
    """Only nothing, an empty directory or an artifact may be replaced (and so deleted)."""
    if not os.path.lexists(target):
        return
    with ContainedDirectory(target) as root:
        try:
            kinds = root.kinds()
            has_processor = kinds.get(PROCESSOR) == stat.S_IFDIR
            inside = root.kinds(PROCESSOR) if has_processor else {}
        except DamageError as error:
            raise NotAnArtifactError(f"{target} cannot be replaced: {error}") from error
    foreign = [name for name, kind in kinds.items() if not _is_ours(name, kind)]
    foreign += [f"{PROCESSOR}/{name}" for name, kind in inside.items() if kind != stat.S_IFREG]
    if kinds and (foreign or not {MANIFEST, CONFIG} & set(kinds)):
        found = ", ".join(foreign[:3] or list(kinds)[:3])
        raise NotAnArtifactError(
            f"{target} holds something that is not an artifact ({found}) and is not replaced; "
            "choose another output directory or empty this one"
        )


def _is_ours(name: str, kind: int) -> bool:
    if name == PROCESSOR:
        return kind == stat.S_IFDIR
    named = name in (MANIFEST, CONFIG, CARD) or SHARD_NAME.match(name) is not None
    return named and kind == stat.S_IFREG


def _small_files(
    config: Mapping[str, Any], processor: Mapping[str, bytes], card: str
) -> dict[str, bytes]:
    """Everything but tensors and manifest; refused here if the reader would refuse it."""
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ArtifactError(f"config: format_version is {version!r}, expected {FORMAT_VERSION}")
    try:
        text = canonical({**config, "format_version": FORMAT_VERSION})
        parse_object(text)
    except JsonError as error:
        raise ArtifactError(f"config cannot be stored as JSON: {error}") from error
    result = {CONFIG: text, CARD: card.encode("utf-8", errors="replace")}
    for name, data in processor.items():
        if not PROCESSOR_NAME.match(name):
            raise ArtifactError(
                f"processor file name {name!r} cannot be stored: use letters, digits, '.', '_', '-'"
            )
        result[f"{PROCESSOR}/{name}"] = bytes(data)
    for name, data in result.items():
        if len(data) > limit_of(name):
            raise ArtifactError(f"{name} has {len(data)} bytes, at most {limit_of(name)} fit")
    return result


def _disk_bytes(
    small: Mapping[str, bytes],
    shards: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
) -> int:
    """What the directory will take of the disk."""
    sizes = _sizes(small, shards, specs).values()
    return sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + 2 * _BLOCK


def _sizes(
    small: Mapping[str, bytes],
    shards: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
) -> dict[str, int]:
    """Bytes of every file; the manifest's number does not depend on the hashes in it."""
    sizes = {name: len(data) for name, data in small.items()}
    for shard, names in shards.items():
        data = sum(specs[name].nbytes for name in names)
        sizes[shard] = len(header_bytes(names, specs)) + data
    unhashed = "0" * 64
    files = {name: FileEntry(size, unhashed) for name, size in sizes.items()}
    entries = {
        name: TensorEntry(shard, specs[name], unhashed)
        for shard, names in shards.items()
        for name in names
    }
    sizes[MANIFEST] = len(_manifest_bytes(Manifest(files, entries)))
    return sizes


class _HashedFile(NewFile):
    """A new file that knows its size and SHA-256."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        super().write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self._size, self._digest.hexdigest())


def _write_tree(
    work: Path,
    small: Mapping[str, bytes],
    shards: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, Tensor],
) -> Manifest:
    files: dict[str, FileEntry] = {}
    entries: dict[str, TensorEntry] = {}
    for name, names in shards.items():
        with _HashedFile(work / name) as file:
            digests = write_shard(names, specs, tensors, file.write)
        files[name] = file.entry
        entries |= {tensor: TensorEntry(name, specs[tensor], digests[tensor]) for tensor in names}
    for name, data in small.items():
        (work / name).parent.mkdir(exist_ok=True)
        with _HashedFile(work / name) as file:
            file.write(data)
        files[name] = file.entry
    manifest = Manifest(files, entries)
    with NewFile(work / MANIFEST) as file:
        file.write(_manifest_bytes(manifest))
    return manifest


def _manifest_bytes(manifest: Manifest) -> bytes:
    data = manifest.to_bytes()
    if len(data) > limit_of(MANIFEST):
        raise ArtifactError(
            f"too many tensors ({len(manifest.tensors)}): the manifest would have {len(data)} bytes"
        )
    return data


# --- reading ---------------------------------------------------------------------------------


def read_artifact(directory: str | os.PathLike[str], *, verify: bool = True) -> Artifact:
    """Load an artifact.

    Args:
        directory: what ``write_artifact`` wrote.
        verify: compare every file with its SHA-256.  Without it everything but the hashes is
            still checked.

    Raises:
        NotAnArtifactError: not a directory with an artifact in it.
        ArtifactError: damaged, incomplete, with additions, or of a newer format; names the file
            and the tensor, what was expected and what was found.
        ResourceError: not enough memory.
    """
    root = _shown(directory)
    try:
        with ContainedDirectory(directory) as folder:
            return _read(folder, Path(root), check_hash=_hash_failures if verify else _no_failures)
    except DamageError as error:
        raise ArtifactError(
            f"artifact {root} is damaged: {error}; save or copy it again"
        ) from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to read artifact {root}") from error


def read_description(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """``omega_config.json`` and the processor's files; no tensor is read and nothing is hashed.

    Raises:
        NotAnArtifactError, ArtifactError: as :func:`read_artifact`.
    """
    root = _shown(directory)
    try:
        with ContainedDirectory(directory) as folder:
            config, manifest = _read_config(folder), _read_manifest(folder)
            names = [f"{PROCESSOR}/{name}" for name in manifest.processor]
            files = [_open_sized(folder, name, manifest) for name in names]
            contents = [file.read(limit_of(file.name)) for file in files]
            return config, dict(zip(manifest.processor, contents, strict=True))
    except DamageError as error:
        raise ArtifactError(
            f"artifact {root} is damaged: {error}; save or copy it again"
        ) from error


def verify_artifact(directory: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte of an artifact and list everything that is wrong.

    Raises:
        NotAnArtifactError: not a directory with an artifact in it.
        ResourceError: not enough memory.
    """
    try:
        with ContainedDirectory(directory) as folder:
            return _verify(folder)
    except MemoryError as error:
        raise ResourceError(f"not enough memory to verify {_shown(directory)}") from error


def _shown(directory: str | os.PathLike[str]) -> str:
    return os.fsdecode(directory)


_HashCheck = Callable[[OpenFile, Manifest, Mapping[str, Span]], Iterator[Failure]]


def _read(folder: ContainedDirectory, root: Path, check_hash: _HashCheck) -> Artifact:
    config = _read_config(folder)
    manifest = _read_manifest(folder)
    _raise_first(_listing_failures(folder, manifest))
    processor: dict[str, bytes] = {}
    for name in _small_names(manifest):
        file = _open_sized(folder, name, manifest)
        _raise_first(check_hash(file, manifest, {}))
        if name.startswith(f"{PROCESSOR}/"):
            processor[name.removeprefix(f"{PROCESSOR}/")] = file.read(limit_of(name))
    shards: list[tuple[OpenFile, dict[str, Span]]] = []
    for name in manifest.shards:
        file = _open_sized(folder, name, manifest)
        spans = read_header(file)
        _raise_first(_strictness_failures(name, spans, manifest.tensors_in(name)))
        shards.append((file, spans))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing releases the interpreter
        hashed = pool.map(lambda shard: list(check_hash(shard[0], manifest, shard[1])), shards)
        for failures in hashed:
            _raise_first(iter(failures))
    tensors: dict[str, Tensor] = {}
    for file, spans in shards:
        _raise_first(find_impossible(file, spans))
        tensors |= map_tensors(file, spans)
    return Artifact(
        config,
        {name: tensors[name] for name in sorted(tensors)},
        processor,
        manifest.content_hash,
        root,
    )


def _verify(folder: ContainedDirectory) -> VerifyReport:
    failures: list[Failure] = []
    checked = 2
    try:
        _read_config(folder)
    except DamageError as error:
        failures.append(error.failure)
    try:
        manifest = _read_manifest(folder)
        failures += _listing_failures(folder, manifest)
    except DamageError as error:
        return VerifyReport(checked, _unique([*failures, error.failure]))
    for name in _small_names(manifest) + manifest.shards:
        try:
            failures += _file_failures(folder, name, manifest)
        except DamageError as error:
            failures.append(error.failure)
    checked = 1 + len(manifest.files) + len(manifest.tensors)
    return VerifyReport(checked, _unique(failures))


def _unique(failures: list[Failure]) -> list[Failure]:
    """A file that cannot be opened is found by several checks, and reported once."""
    return list(dict.fromkeys(failures))


def _file_failures(folder: ContainedDirectory, name: str, manifest: Manifest) -> Iterator[Failure]:
    file = _open_sized(folder, name, manifest)
    if not SHARD_NAME.match(name):
        yield from _hash_failures(file, manifest, {})
        return
    try:
        spans = read_header(file)
    except DamageError as error:
        yield error.failure
        yield from _hash_failures(file, manifest, {})
        return
    entries = manifest.tensors_in(name)
    yield from _strictness_failures(name, spans, entries)
    yield from _hash_failures(file, manifest, spans)
    yield from _tensor_hash_failures(file, manifest, spans)
    yield from find_impossible(file, spans)


def _read_config(folder: ContainedDirectory) -> dict[str, Any]:
    """The configuration; a newer format is recognised here, before anything else is read."""
    kinds = folder.kinds()
    if not {MANIFEST, CONFIG} & set(kinds):
        raise NotAnArtifactError(
            f"{folder.path!r} is not an artifact: it has neither {CONFIG} nor {MANIFEST}; give the "
            "directory that 'quantize --out' wrote"
        )
    try:
        config = parse_object(folder.open(CONFIG).read(limit_of(CONFIG)))
    except JsonError as error:
        raise DamageError(CONFIG, str(error)) from error
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise DamageError(CONFIG, f"format_version: expected a number, found {version!r:.80}")
    if version > FORMAT_VERSION:
        raise DamageError(
            CONFIG,
            f"format_version {str(version)[:20]} is newer than this library reads "
            f"({FORMAT_VERSION}): update omega-qvla",
        )
    return config


def _read_manifest(folder: ContainedDirectory) -> Manifest:
    return parse_manifest(folder.open(MANIFEST).read(limit_of(MANIFEST)))


def _small_names(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if not SHARD_NAME.match(name))


def _raise_first(failures: Iterator[Failure]) -> None:
    for failure in failures:
        raise DamageError(failure.file, failure.reason, failure.tensor)


def _listing_failures(folder: ContainedDirectory, manifest: Manifest) -> Iterator[Failure]:
    """The directory holds the manifest's files, as regular files, and nothing else."""
    found = folder.kinds()
    if PROCESSOR in found and manifest.processor:
        kind = found.pop(PROCESSOR)
        if kind == stat.S_IFDIR:
            inside = folder.kinds(PROCESSOR)
            found |= {f"{PROCESSOR}/{name}": kind for name, kind in inside.items()}
        else:
            yield Failure(PROCESSOR, None, f"expected a directory, found {describe(kind)}")
    expected = {MANIFEST, *manifest.files}
    for name in sorted(expected | set(found)):
        if name not in found:
            yield Failure(name, None, "is missing")
        elif name not in expected:
            reason = f"{describe(found[name])} that is not part of the artifact"
            yield Failure(_printable(name), None, reason)
        elif found[name] != stat.S_IFREG:
            reason = f"expected a regular file, found {describe(found[name])}"
            yield Failure(name, None, reason)


def _printable(name: str) -> str:
    """A name found on disk, safe to print and to encode."""
    return name if name.isprintable() else ascii(name)


def _open_sized(folder: ContainedDirectory, name: str, manifest: Manifest) -> OpenFile:
    file = folder.open(name)
    expected = manifest.files[name].size
    if file.size != expected:
        raise DamageError(name, f"expected {expected} bytes, found {file.size}")
    if not SHARD_NAME.match(name) and file.size > limit_of(name):
        raise DamageError(name, f"has {file.size} bytes, at most {limit_of(name)} are accepted")
    return file


def _strictness_failures(
    file: str, spans: Mapping[str, Span], entries: Mapping[str, TensorEntry]
) -> Iterator[Failure]:
    """Missing, additional, misshaped and mistyped tensors."""
    for name in sorted(spans.keys() | entries.keys()):
        if name not in spans:
            yield Failure(file, name, f"expected {entries[name].spec}, found no such tensor")
        elif name not in entries:
            yield Failure(file, name, f"expected no such tensor, found {spans[name].spec}")
        elif spans[name].spec != entries[name].spec:
            reason = f"expected {entries[name].spec}, found {spans[name].spec}"
            yield Failure(file, name, reason)


def _no_failures(
    file: OpenFile, manifest: Manifest, spans: Mapping[str, Span]
) -> Iterator[Failure]:
    del file, manifest, spans
    return iter(())


def _hash_failures(
    file: OpenFile, manifest: Manifest, spans: Mapping[str, Span]
) -> Iterator[Failure]:
    """A file against its SHA-256; only if they differ, which tensors it is."""
    if file_digest(file) != manifest.files[file.name].sha256:
        yield from _located(file, manifest, spans)


def _located(file: OpenFile, manifest: Manifest, spans: Mapping[str, Span]) -> Iterator[Failure]:
    damaged = list(_tensor_hash_failures(file, manifest, spans))
    yield from damaged or [Failure(file.name, None, _WRONG_HASH)]


def _tensor_hash_failures(
    file: OpenFile, manifest: Manifest, spans: Mapping[str, Span]
) -> Iterator[Failure]:
    """Every tensor whose bytes do not have their SHA-256."""
    for name, span in spans.items():
        entry = manifest.tensors.get(name)
        if entry is not None and tensor_digest(file, span) != entry.sha256:
            yield Failure(file.name, name, _WRONG_HASH)
