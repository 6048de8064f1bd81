"""The only format policies are saved in: one directory, complete, checked and contained.

    omega_config.json                  what the policy is, how it was quantized, "format_version": 1
    model-00001-of-0000N.safetensors   tensors (``tensors.py``)
    manifest.json                      all files with SHA-256, all tensors (``manifest.py``)
    processor/*                        statistics and tokenizer, as opaque files
    README.md                          the model card
    config.json, policy_*.json         what LeRobot's plug-in reads, where it can run the policy

``write_artifact`` builds the directory beside its destination and swaps it in when all of it is on
the disk (``files.py``); equal inputs give equal bytes.  ``read_artifact`` accepts exactly what
``write_artifact`` writes: every file and tensor of the manifest and nothing else, each of its
shape, dtype and hash, no NaN.  ``read_description`` makes the same checks of everything but the
tensor files, of which it looks at the size alone.  ``verify_artifact`` makes all checks and lists
what it finds instead of stopping.  Nothing here executes what it reads.

Files are read in pieces of 1 MiB; tensors are mapped, not copied.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from omega_qvla.artifact.layout import Layout
from omega_qvla.artifact.manifest import (
    CARD,
    CONFIG,
    FORMAT_VERSION,
    LEROBOT,
    MANIFEST,
    PROCESSOR,
    PROCESSOR_NAME,
    SHARD_NAME,
    FileEntry,
    Manifest,
    limit_of,
    parse_manifest,
    shard_name,
)
from omega_qvla.artifact.strict_json import JsonError, canonical, parse_object
from omega_qvla.artifact.tensors import (
    Shard,
    assign_shards,
    digest,
    shard_bytes,
    spec_of,
    write_shard,
)
from omega_qvla.claims import Claim
from omega_qvla.errors import ArtifactError, NotAnArtifactError, ResourceError
from omega_qvla.files import (
    ContainedDirectory,
    DamageError,
    Failure,
    OpenFile,
    describe,
    place_of,
    preflight_disk,
    reason_of,
    replace_directory,
)

MAX_SHARD_BYTES = 256 << 20
_HASHING_THREADS = 2
_BLOCK = 4096  # files take whole blocks


@dataclass(frozen=True)
class Description:
    """An artifact without its tensors.

    Attributes:
        config: ``omega_config.json``.
        processor: files of ``processor/`` by name.
        manifest: every file and tensor.
    """

    config: dict[str, Any]
    processor: dict[str, bytes]
    manifest: Manifest

    @property
    def content_hash(self) -> str:
        """Identifies every byte of the artifact."""
        return self.manifest.content_hash

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        own = len(self.manifest.to_bytes())
        return own + sum(entry.size for entry in self.manifest.files.values())


@dataclass(frozen=True)
class Artifact(Description):
    """A loaded artifact.

    Attributes:
        tensors: by name; private mappings of the files, so nothing is copied until it is used.
        root: the directory.
    """

    tensors: dict[str, Tensor]
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
    lerobot: Mapping[str, bytes] | None = None,
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
        lerobot: file name → bytes of what LeRobot's plug-in reads: all of ``LEROBOT``, or none.
        max_shard_bytes: tensor files are cut so that none holds more, unless one tensor does.
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
    small = _small_files(config, processor, card, lerobot or {})
    shards = _shards({name: spec_of(name, t) for name, t in tensors.items()}, max_shard_bytes)
    sizes = _sizes(small, shards).values()
    preflight_disk(target, sum(-(-size // _BLOCK) * _BLOCK for size in sizes) + 2 * _BLOCK)
    with Claim(target) if claim is None else nullcontext(), replace_directory(target) as work:
        for name, data in small.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).write_bytes(data)
        for name, layout in shards.items():
            write_shard(work / name, {tensor: tensors[tensor] for tensor in layout})
        with ContainedDirectory(work) as written:
            files = {name: written.open(name) for name in (*small, *shards)}
            entries = {n: FileEntry(size=f.size, sha256=digest(f)) for n, f in files.items()}
        manifest = Manifest.of(entries, shards)
        (work / MANIFEST).write_bytes(_manifest_bytes(manifest))
    return manifest.content_hash


def planned_bytes(
    *,
    config: Mapping[str, Any],
    tensors: Layout,
    processor: Mapping[str, bytes],
    card: str,
    lerobot: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Bytes of the files that ``write_artifact`` would write, from dtypes and shapes alone.

    Args:
        config, processor, card, lerobot, max_shard_bytes: as for ``write_artifact``.
        tensors: dtype and shape by name.

    Raises:
        ArtifactError: something that an artifact cannot hold.
    """
    small = _small_files(config, processor, card, lerobot or {})
    return sum(_sizes(small, _shards(tensors, max_shard_bytes)).values())


def preflight(directory: str | os.PathLike[str], needed: int) -> None:
    """Refuse before hours of work what could not be saved after them.

    Args:
        directory: where the artifact will go.
        needed: bytes it will take; the journal kept meanwhile takes about as many again.

    Raises:
        NotAnArtifactError: the directory holds something that is not an artifact.
        ResourceError: the disk has less than twice ``needed`` bytes.
    """
    _check_replaceable(place_of(directory))
    preflight_disk(directory, 2 * needed)


def _check_replaceable(target: Path) -> None:
    """Only nothing, an empty directory or an artifact may be replaced (and so deleted)."""
    if not os.path.lexists(target):
        return
    try:
        with _opened(target) as root:
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
    named = name in (MANIFEST, CONFIG, CARD, *LEROBOT) or SHARD_NAME.match(name) is not None
    return named and kind == stat.S_IFREG


def _small_files(
    config: Mapping[str, Any],
    processor: Mapping[str, bytes],
    card: str,
    lerobot: Mapping[str, bytes],
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
    if lerobot and set(lerobot) != set(LEROBOT):
        raise ArtifactError(f"of the files for LeRobot ({', '.join(LEROBOT)}) all or none are kept")
    result = {CONFIG: text, CARD: card.encode("utf-8", errors="replace"), **lerobot}
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


def _shards(specs: Layout, max_bytes: int) -> dict[str, Layout]:
    """The tensor files by name, each with what it will hold."""
    plan = assign_shards(specs, max_bytes)
    return {
        shard_name(i, len(plan)): {name: specs[name] for name in names}
        for i, names in enumerate(plan)
    }


def _sizes(small: Mapping[str, bytes], shards: Mapping[str, Layout]) -> dict[str, int]:
    """Bytes of every file; the manifest's number does not depend on the hashes in it."""
    sizes = {name: len(data) for name, data in small.items()}
    sizes |= {name: shard_bytes(layout) for name, layout in shards.items()}
    entries = {name: FileEntry(size=size, sha256="0" * 64) for name, size in sizes.items()}
    return {**sizes, MANIFEST: len(_manifest_bytes(Manifest.of(entries, shards)))}


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
        verify: compare every file with its SHA-256.  Without it everything but the hashes of the
            tensor files is still checked.

    Raises:
        NotAnArtifactError: not a directory with an artifact in it.
        ArtifactError: damaged, incomplete, with additions, or of a newer format; names the file
            and the tensor, what was expected and what was found.
        ResourceError: not enough memory.
    """
    with _reading(directory) as folder:
        found = _describe(folder)
        shards = [
            Shard(_open_sized(folder, name, found.manifest), layout)
            for name, layout in found.manifest.shards.items()
        ]
        for shard in shards:
            _raise_first(iter(shard.failures))
        if verify:
            files = [shard.file for shard in shards]
            with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing releases the interpreter
                digests = pool.map(digest, files)
                _raise_first(_hash_failures(files, found.manifest, digests))
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            _raise_first(shard.impossible())
            tensors |= shard.tensors()
        ordered = {name: tensors[name] for name in sorted(tensors)}
        return Artifact(
            found.config, found.processor, found.manifest, ordered, Path(os.fsdecode(directory))
        )


def read_description(directory: str | os.PathLike[str]) -> Description:
    """What an artifact holds; no tensor file is read.

    Raises:
        NotAnArtifactError, ArtifactError, ResourceError: as :func:`read_artifact`.
    """
    with _reading(directory) as folder:
        found = _describe(folder)
        for name in found.manifest.shards:
            _open_sized(folder, name, found.manifest)
        return found


def verify_artifact(directory: str | os.PathLike[str]) -> VerifyReport:
    """Check every byte of an artifact and list everything that is wrong.

    Raises:
        NotAnArtifactError: not a directory with an artifact in it.
        ResourceError: not enough memory.
    """
    with _reading(directory) as folder:
        failures: list[Failure] = []

        def attempt(check: Callable[[], Iterator[Failure]]) -> None:
            try:
                failures.extend(check())
            except DamageError as error:
                failures.append(error.failure)

        attempt(lambda: _config_failures(folder))
        try:
            manifest = _read_manifest(folder)
        except DamageError as error:
            return VerifyReport(2, _unique([*failures, error.failure]))
        attempt(lambda: _listing_failures(folder, manifest))
        for name in (*manifest.small, *manifest.shards):
            attempt(lambda name=name: _file_failures(folder, name, manifest))
        checked = 1 + len(manifest.files) + len(manifest.tensors)
        return VerifyReport(checked, _unique(failures))


@contextmanager
def _reading(directory: str | os.PathLike[str]) -> Generator[ContainedDirectory, None, None]:
    shown = os.fsdecode(directory)
    try:
        with _opened(directory) as folder:
            yield folder
    except DamageError as error:
        raise ArtifactError(
            f"artifact {shown} is damaged: {error}; save or copy it again"
        ) from error
    except MemoryError as error:
        raise ResourceError(f"not enough memory to read artifact {shown}") from error


def _opened(directory: str | os.PathLike[str]) -> ContainedDirectory:
    """The directory, or the one that a killed writer had just moved aside."""
    try:
        try:
            return ContainedDirectory(place_of(directory))
        except FileNotFoundError:  # a writer has put the new one in place meanwhile
            return ContainedDirectory(directory)
    except (OSError, ValueError) as error:
        raise NotAnArtifactError(
            f"{os.fspath(directory)!r} is not an artifact: {reason_of(error)}; give the directory "
            "that 'quantize --out' wrote"
        ) from error


def _describe(folder: ContainedDirectory) -> Description:
    config = _read_config(folder)
    manifest = _read_manifest(folder)
    _raise_first(_listing_failures(folder, manifest))
    files = [_open_sized(folder, name, manifest) for name in manifest.small]
    _raise_first(_hash_failures(files, manifest))
    prefix = f"{PROCESSOR}/"
    processor = {
        file.name.removeprefix(prefix): file.read(limit_of(file.name))
        for file in files
        if file.name.startswith(prefix)
    }
    return Description(config, processor, manifest)


def _unique(failures: list[Failure]) -> list[Failure]:
    """A file that cannot be opened is found by several checks, and reported once."""
    return list(dict.fromkeys(failures))


def _config_failures(folder: ContainedDirectory) -> Iterator[Failure]:
    _read_config(folder)
    yield from ()


def _file_failures(folder: ContainedDirectory, name: str, manifest: Manifest) -> Iterator[Failure]:
    file = _open_sized(folder, name, manifest)
    yield from _hash_failures([file], manifest)
    if SHARD_NAME.match(name):
        shard = Shard(file, manifest.shards[name])
        yield from shard.failures
        yield from shard.impossible()


def _read_config(folder: ContainedDirectory) -> dict[str, Any]:
    """The configuration; a newer format is recognised here, before anything else is read."""
    if not {MANIFEST, CONFIG} & set(folder.kinds()):
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


def _raise_first(failures: Iterator[Failure]) -> None:
    for failure in failures:
        raise DamageError(failure.file, failure.reason, failure.tensor)


def _listing_failures(folder: ContainedDirectory, manifest: Manifest) -> Iterator[Failure]:
    """The directory holds the manifest's files, as regular files, and nothing else."""
    found = folder.kinds()
    if PROCESSOR in found and any(name.startswith(f"{PROCESSOR}/") for name in manifest.files):
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
            shown = name if name.isprintable() else ascii(name)
            reason = f"{describe(found[name])} that is not part of the artifact"
            yield Failure(shown, None, reason)
        elif found[name] != stat.S_IFREG:
            reason = f"expected a regular file, found {describe(found[name])}"
            yield Failure(name, None, reason)


def _open_sized(folder: ContainedDirectory, name: str, manifest: Manifest) -> OpenFile:
    file = folder.open(name)
    expected = manifest.files[name].size
    if file.size != expected:
        raise DamageError(name, f"expected {expected} bytes, found {file.size}")
    if not SHARD_NAME.match(name) and file.size > limit_of(name):
        raise DamageError(name, f"has {file.size} bytes, at most {limit_of(name)} are accepted")
    return file


def _hash_failures(
    files: Sequence[OpenFile], manifest: Manifest, digests: Iterable[str] | None = None
) -> Iterator[Failure]:
    """Every file whose bytes do not have their SHA-256; ``digests`` where they are known."""
    for file, found in zip(files, digests or map(digest, files), strict=True):
        if found != manifest.files[file.name].sha256:
            reason = "its bytes do not have the SHA-256 of the manifest"
            yield Failure(file.name, None, reason)
