"""Reading inside one directory only; writing what is there whole or not at all.

**Reading.** ``ContainedDirectory`` holds a descriptor of the directory and opens entries relative
to it, by plain names, without following links.  What is opened is first looked at: only regular
files are, so that a FIFO cannot block the reader and a device never notices it.  After opening,
the descriptor is compared with what was looked at.  Everything later (hashing, parsing, mapping)
uses that descriptor; no path is resolved twice.

**Writing.** A file is written beside its place, flushed to the disk and renamed (``new_file``).  A
directory is built beside its place, flushed, and takes the place of an earlier one by two renames
(``replace_directory``).  Whoever is killed between the two leaves the earlier one under
``.NAME.previous``; ``place_of`` finds it there, and the next writer puts it back first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omega_qvla.errors import ArtifactError, ResourceError

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_BYTES = 1 << 20
MAX_ENTRIES = 100_000

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True)
class Failure:
    """One thing wrong with a directory: which file, which tensor if any, and what."""

    file: str
    tensor: str | None
    reason: str

    def __str__(self) -> str:
        where = self.file if self.tensor is None else f"{self.file}: tensor {self.tensor!r}"
        return f"{where}: {self.reason}"


class DamageError(ArtifactError):
    """A failure that ends the reading of a file."""

    def __init__(self, file: str, reason: str, tensor: str | None = None) -> None:
        self.failure = Failure(file, tensor, reason)
        super().__init__(str(self.failure))


# --- reading ---------------------------------------------------------------------------------


class OpenFile:
    """A regular file, open for reading; ``size`` is its size when opened."""

    def __init__(self, name: str, descriptor: int, size: int) -> None:
        self.name, self.descriptor, self.size = name, descriptor, size

    @property
    def path(self) -> str:
        """A path of the very file that is open, for libraries that take nothing else."""
        return f"/dev/fd/{self.descriptor}"

    def chunks(self, begin: int, end: int) -> Iterator[memoryview]:
        """Bytes [begin, end) in pieces of one reused buffer; a piece lives until the next one.

        Raises:
            DamageError: the file ends early or cannot be read.
        """
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(end - begin, 0))))
        while begin < end:
            wanted = buffer[: min(len(buffer), end - begin)]
            filled = 0
            while filled < len(wanted):
                try:
                    count = os.preadv(self.descriptor, [wanted[filled:]], begin + filled)
                except OSError as error:
                    raise DamageError(self.name, f"cannot be read: {error.strerror}") from error
                if count == 0:
                    raise DamageError(self.name, f"ends at byte {begin + filled}, expected {end}")
                filled += count
            yield wanted
            begin += filled

    def read(self, limit: int) -> bytes:
        """The whole file.

        Raises:
            DamageError: larger than ``limit`` bytes, or unreadable.
        """
        if self.size > limit:
            raise DamageError(self.name, f"has {self.size} bytes, at most {limit} are accepted")
        return b"".join(bytes(chunk) for chunk in self.chunks(0, self.size))


class ContainedDirectory:
    """A directory whose entries can be listed and opened, and nothing outside it; a context.

    Names are relative, with at most one ``/``; validating them further is the caller's business,
    but no name can leave the directory.

    Args:
        path: of the directory; may itself be a link.

    Raises:
        OSError, ValueError: it is no directory that can be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._stack = ExitStack()
        self._folders = {"": os.open(path, _READ_DIRECTORY)}
        self._stack.callback(os.close, self._folders[""])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kinds(self, folder: str = "") -> dict[str, int]:
        """File type (``stat.S_IFMT``) of every entry of the directory, or of one folder in it."""
        result: dict[str, int] = {}
        try:
            with os.scandir(self._folder(folder)) as entries:
                for entry in entries:
                    mode = entry.stat(follow_symlinks=False).st_mode
                    result[entry.name] = stat.S_IFMT(mode)
                    if len(result) > MAX_ENTRIES:
                        raise DamageError(folder or ".", f"more than {MAX_ENTRIES} entries")
        except OSError as error:
            raise DamageError(folder or ".", f"cannot be listed: {error.strerror}") from error
        return dict(sorted(result.items()))

    def open(self, name: str) -> OpenFile:
        """Open a regular file; it is closed with the directory.

        Raises:
            DamageError: missing, not a regular file, or not a name inside the directory.
        """
        folder, _, base = name.rpartition("/")
        if base in ("", ".", "..") or "/" in folder or "\0" in name:
            raise DamageError(name, "is not the name of a file in this directory")
        try:
            parent = self._folder(folder)
            seen = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if not stat.S_ISREG(seen.st_mode):
                raise DamageError(name, f"expected a regular file, found {describe(seen.st_mode)}")
            descriptor = os.open(base, _READ, dir_fd=parent)
            self._stack.callback(os.close, descriptor)
            found = os.fstat(descriptor)
        except (OSError, ValueError) as error:
            raise DamageError(name, f"cannot be opened: {reason_of(error)}") from error
        if (found.st_dev, found.st_ino) != (seen.st_dev, seen.st_ino):
            raise DamageError(name, "was replaced while it was being opened")
        return OpenFile(name, descriptor, found.st_size)

    def _folder(self, name: str) -> int:
        if name not in self._folders:
            if name in (".", "..") or "/" in name:
                raise DamageError(name, "is not the name of a folder in this directory")
            descriptor = os.open(name, _READ_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._folders[""])
            self._stack.callback(os.close, descriptor)
            self._folders[name] = descriptor
        return self._folders[name]


def describe(mode: int) -> str:
    """A file type in words."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link (copy the files themselves: cp -rL)",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def reason_of(error: OSError | ValueError) -> str:
    """What went wrong, without the path."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


# --- writing ---------------------------------------------------------------------------------


@contextmanager
def new_file(path: Path) -> Generator[Path, None, None]:
    """A name beside ``path`` to write a file to; it becomes ``path`` when the block ends well.

    On an exception what was written is removed and ``path`` is as it was.  Folders above it are
    made.  The name is always the same, so that what a kill leaves is replaced by the next writer.

    Raises:
        ResourceError: the disk is full or refuses to be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.chmod(partial, 0o644)
            _sync(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file: it is either the old one or the complete new one.

    Raises:
        ResourceError: it cannot be written.
    """
    with new_file(path) as partial:
        partial.write_bytes(content)


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    """Write JSON: the file is either the old one or the complete new one.

    Raises:
        ResourceError: it cannot be written.
        ValueError: a number is not finite; nothing was written.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_file(Path(path), text.encode())


def preflight_disk(directory: str | os.PathLike[str], needed: int) -> None:
    """Refuse early what cannot fit on the file system that ``directory`` is, or will be, on.

    Raises:
        ResourceError: fewer than ``needed`` bytes are available; names both.
    """
    place = Path(os.path.realpath(directory))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    available = shutil.disk_usage(place).free
    if available < needed:
        raise ResourceError(
            f"not enough disk space for {os.fspath(directory)}: needed {needed:,} bytes, "
            f"available {available:,}; free some, or choose an output directory on another disk"
        )


def place_of(directory: str | os.PathLike[str]) -> Path:
    """Where a directory is: at its name, or where a writer that was killed had just put it."""
    target = Path(os.path.realpath(directory))
    return (
        target if os.path.lexists(target) or not _previous(target).is_dir() else _previous(target)
    )


def put_back(directory: str | os.PathLike[str]) -> None:
    """Undo what a killed ``replace_directory`` left; the caller has the claim on the directory."""
    target = Path(os.path.realpath(directory))
    previous = _previous(target)
    if previous.is_dir() and not previous.is_symlink() and not os.path.lexists(target):
        os.rename(previous, target)
    for left in (previous, _unfinished(target)):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def replace_directory(target: Path) -> Generator[Path, None, None]:
    """A new empty directory that takes the place of ``target`` when the block ends well.

    The caller has the claim on ``target`` (``claims.py``).  On an exception the new directory is
    removed and ``target`` is as it was.

    Raises:
        ResourceError: the disk is full or refuses to be written.
    """
    work = _unfinished(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        os.mkdir(work)
        try:
            yield work
            for folder, _, names in os.walk(work, topdown=False):
                for name in [*names, "."]:
                    _sync(Path(folder) / name)
            _put_in_place(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ResourceError(
            f"cannot write {target}: {'the disk is full' if full else reason_of(error)}; what was "
            "there before is untouched; "
            + ("free some space and save again" if full else "check the path and its permissions")
        ) from error


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.saving")


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put_in_place(work: Path, target: Path) -> None:
    """Two renames, both undone if they cannot be made durable."""
    previous = _previous(target)
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in ((target, previous), (work, target)):
            if source.exists():
                os.rename(source, destination)
                done.append((source, destination))
        _sync(target.parent)
    except OSError:
        for source, destination in reversed(done):
            os.rename(destination, source)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
