"""Reading inside one directory only, and replacing a directory in one step.

**Reading.** ``ContainedDirectory`` holds a descriptor of the directory and opens entries relative
to it, by plain names, without following links.  What is opened is first looked at: only regular
files are, so that a FIFO cannot block the reader and a device never notices it.  After opening,
the descriptor is compared with what was looked at.  Everything later (hashing, parsing, mapping)
uses that descriptor; no path is resolved twice.

**Writing.** ``replace_directory`` gives the caller a new directory beside the target.  When the
caller is done, every file and directory is on disk (fsync), and one ``renameat2(RENAME_EXCHANGE)``
(``renamex_np(RENAME_SWAP)`` on macOS) swaps it with the previous output, which is then deleted.  A
reader sees the old output or the new one, at every instant and after a crash.  File systems without
an exchanging rename get two renames; a crash exactly between them leaves the previous output
under ``.NAME.previous``, and the next save puts it back first.

A crashed writer leaves its unfinished directory behind; it held a lock on it, which died with it.
The next save to the same target removes unfinished directories that nobody locks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from omega_qvla.errors import ArtifactError, NotAnArtifactError, ResourceError

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK_BYTES = 1 << 20
MAX_ENTRIES = 100_000

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_READ_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Failure:
    """One thing wrong with an artifact: which file, which tensor if any, and what."""

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


class OpenFile:
    """A regular file of an artifact, open for reading; ``size`` is its size when opened."""

    def __init__(self, name: str, descriptor: int, size: int) -> None:
        self.name, self.descriptor, self.size = name, descriptor, size

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
    """A directory whose entries can be listed and opened, and nothing outside it.

    Names are relative, with at most one ``/``; validating them further is the caller's business,
    but no name can leave the directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``, which may itself be a link.

        Raises:
            NotAnArtifactError: not a directory that can be opened.
        """
        self.path = os.fspath(path)
        self._stack = ExitStack()
        try:
            descriptor = os.open(path, _READ_DIRECTORY)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise NotAnArtifactError(
                f"{self.path!r} is not an artifact: {reason}; give the directory that "
                "'quantize --out' wrote"
            ) from error
        self._stack.callback(os.close, descriptor)
        self._folders: dict[str, int] = {"": descriptor}

    def __enter__(self) -> ContainedDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            raise DamageError(name, f"cannot be opened: {_reason(error)}") from error
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


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


# --- writing ---------------------------------------------------------------------------------


class NewFile:
    """A file being written, as a context; leaving it returns after its bytes are on the disk."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, _CREATE, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._descriptor, view[:CHUNK_BYTES]) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


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


@contextmanager
def replace_directory(target: Path) -> Generator[Path, None, None]:
    """A new empty directory that takes the place of ``target`` when the block ends well.

    On an exception the new directory is removed and ``target`` is as it was.

    Raises:
        ResourceError: the disk is full or refuses to be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _tidy(target)
        with _new_directory(target) as work:
            yield work
            _sync_tree(work)
            _put_in_place(work, target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else _reason(error)
        raise ResourceError(
            f"cannot write {target}: {reason}; what was there before is untouched; "
            + ("free some space and save again" if full else "check the path and its permissions")
        ) from error


@contextmanager
def _new_directory(target: Path) -> Generator[Path, None, None]:
    """A locked sibling of ``target``; whatever lies at its path is removed in the end."""
    path = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}")
    os.mkdir(path)
    descriptor = -1
    try:
        descriptor = os.open(path, _READ_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _tidy(target: Path) -> None:
    """Undo what a killed writer left: restore a previous output, remove unfinished directories."""
    previous = _previous(target)
    if previous.is_dir() and not previous.is_symlink():
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, target)
    for entry in os.scandir(target.parent):
        if entry.name.startswith(_prefix(target)) and entry.is_dir(follow_symlinks=False):
            _remove_unlocked(entry.path)


def _remove_unlocked(path: str) -> None:
    try:
        descriptor = os.open(path, _READ_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return  # its writer is alive
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, _ in os.walk(root, topdown=False):
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, _READ_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(work: Path, target: Path) -> None:
    """Swap, and swap back if the swap itself cannot be made durable."""
    if not target.exists():
        os.rename(work, target)
        undo = os.rename
    elif _exchange(work, target):
        undo = _exchange
    else:
        os.rename(target, _previous(target))
        os.rename(work, target)
        shutil.rmtree(_previous(target), ignore_errors=True)
        return
    try:
        _sync_directory(target.parent)
    except OSError:
        undo(target, work)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            result = library.renamex_np(*paths, ctypes.c_uint(2))
        else:
            here = ctypes.c_int(-100)  # AT_FDCWD
            result = library.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(2))
    except AttributeError:  # a C library without the call
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
