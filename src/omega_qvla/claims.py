"""One writer per output: a lock of the operating system beside it.

A claim on ``NAME`` is an exclusive ``flock`` on ``.NAME.lock`` in the same folder; the file says
who holds it, for the message to whoever comes second.  The lock belongs to the open file: it ends
with its process however that ends, so nothing has to be cleared by hand after a kill, and two
threads of one process exclude each other as two processes do.  On a network file system it holds
between machines where that file system has locks; where it has none, the claim is refused.

The file is removed by its holder while the lock is still held.  Whoever opened it before finds,
after getting the lock, that the name no longer leads to what it locked, and tries again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from omega_qvla.errors import OutputError, ResourceError

if TYPE_CHECKING:
    from typing_extensions import Self

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_PATIENCE_S = 1.0
"""How long a holder may take to write its name after getting the lock."""


class Claim:
    """The right to write one output, as a context; it is given back at the end of the block.

    Args:
        target: the file or directory that will be written; folders above it are made, and removed
            again at the end if nothing was put into them.  Links are followed, so that two names of
            one place are one claim.

    Raises:
        OutputError: another process or thread has it; says which, where, since when, doing what.
        ResourceError: nothing can be written or locked there.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = Path(os.path.realpath(target))
        self._path = self.target.parent / f".{self.target.name}.lock"
        self._made: list[Path] = []
        try:
            self._made = _make(self.target.parent)
            self._descriptor = _lock(self._path, Path(target))
        except OSError as error:
            _unmake(self._made)
            raise ResourceError(
                f"cannot lock {os.fspath(target)} for writing ({self._path}: {error.strerror}); "
                "check its folder and permissions, and that its file system has locks"
            ) from error
        except OutputError:
            _unmake(self._made)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the output back; may be called again."""
        if self._descriptor < 0:
            return
        with suppress(OSError):
            if _leads_to(self._path, self._descriptor):
                self._path.unlink()
            # Before closing: a child that was forked meanwhile has the same open file.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = -1
        _unmake(self._made)


def _lock(path: Path, target: Path) -> int:
    while True:
        descriptor = os.open(path, _OPEN, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _myself(), 0)
                return descriptor
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise OutputError(
                f"{target} is being written by {holder}; wait for it to end, or give another output"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder removed it: lock the one that is there now


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether the name is still that of the open file."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _myself() -> bytes:
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    return json.dumps({**who, "command": shlex.join(sys.orig_argv)}).encode()


def _holder(descriptor: int) -> str:
    """Who holds a lock, in words, once they have written it."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            who = json.loads(os.pread(descriptor, 1 << 16, 0))
            return (
                f"process {who['pid']} on {who['host']} since {who['since']} "
                f"({str(who['command'])[:300]})"
            )
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.02)
    return "a process that does not say its name"


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns what was missing, the innermost first."""
    missing: list[Path] = []
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        missing.append(place)
        place = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(folders: list[Path]) -> None:
    """Remove the folders that are still empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def require_free_file(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there, unless it may be replaced.

    Raises:
        OutputError: it is there and ``overwrite`` is not given, or it is no regular file.
    """
    if not path.is_symlink() and not path.exists():
        return
    if not path.is_file():
        raise OutputError(f"{path} is not a regular file, so no result is written there")
    if not overwrite:
        raise OutputError(
            f"{path} is there already ({path.stat().st_size:,} bytes); give `overwrite=True` to "
            "replace it, or another name"
        )
