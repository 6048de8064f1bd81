"""Opening the files of a policy directory: inside it, regular, complete, and never executed.

A policy directory may come from anybody (SECURITY.md).  Names inside it come from JSON that came
with it, so a name must be a plain file name and must lead to a regular file of the same directory.
Links out of the directory are refused, with one exception: the hub's cache keeps
``snapshots/<commit>/NAME`` as a link to ``blobs/<hash>`` of the same repository.

Torch's own files (``.pt``, ``.bin`` and relatives) run code when they are opened and are never read
here; the refusal says how their owner converts them.
"""

from __future__ import annotations

import json
import shlex
import stat
from importlib.resources import files
from pathlib import Path
from typing import Any

from omega_qvla.errors import PolicyError

MAX_TEXT_BYTES = 64 << 20
"""More than any tokenizer or index of shards; a larger sidecar file is not one."""

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_LFS_POINTER = b"version https://git-lfs"


def contained_file(directory: Path, name: str) -> Path:
    """The path of a regular file of the directory.

    Args:
        directory: the policy directory.
        name: a plain file name, or a path of plain names separated by ``/``.

    Raises:
        PolicyError: the name leads out of the directory, or to no regular file.
    """
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise PolicyError(f"{directory} names the file {name!r}, which leads out of the directory")
    path = directory.joinpath(*parts)
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise PolicyError(f"cannot read {path}: {_reason(error)}") from error
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise PolicyError(f"{path} is a link that leads out of the directory, to {real}")
    if not stat.S_ISREG(mode):
        raise PolicyError(f"cannot read {path}: it is not a regular file")
    return path


def read_bytes(directory: Path, name: str) -> bytes:
    """A small file of the directory.

    Raises:
        PolicyError: as ``contained_file``; or too large, or only a pointer to the real file.
    """
    path = contained_file(directory, name)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise PolicyError(f"{path} has {size} bytes, more than {MAX_TEXT_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise PolicyError(f"cannot read {path}: {_reason(error)}") from error
    refuse_pointer(path, content[: len(_LFS_POINTER)])
    return content


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object of the directory.

    Raises:
        PolicyError: as ``read_bytes``; or not a JSON object.
    """
    return parse_json(read_bytes(directory, name), str(directory / name))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A JSON object; ``where`` names it in errors.

    Raises:
        PolicyError: not a JSON object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{where} must hold a JSON object")
    return content


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Refuse what git stores in place of a large file.

    Raises:
        PolicyError: the file begins like a git-lfs pointer.
    """
    if beginning.startswith(_LFS_POINTER):
        raise PolicyError(
            f"{path} is only a git-lfs pointer, its contents were not downloaded; run: git lfs pull"
        )


def refuse_unsafe(directory: Path) -> None:
    """Refuse a directory whose weights are in a format that executes code, with the remedy.

    Raises:
        PolicyError: there are such files.
    """
    unsafe = sorted(p for p in directory.iterdir() if p.suffix in UNSAFE_SUFFIXES)
    if unsafe:
        raise PolicyError(unsafe_message(unsafe))


def unsafe_message(paths: list[Path]) -> str:
    """Why these files are not read, and the command that converts them."""
    command = files("omega_qvla.checkpoints").joinpath("convert.txt").read_text("utf-8")
    names = " ".join(shlex.quote(str(path)) for path in paths)
    return (
        f"{', '.join(path.name for path in paths)}: this format runs code when it is opened, and "
        "is not read here. If you trust the files, convert them to safetensors, best in a "
        f"container:\n{command.rstrip()} {names}"
    )


def _roots(directory: Path) -> list[Path]:
    real = directory.resolve()
    if real.parent.name == "snapshots":
        return [real, real.parent.parent / "blobs"]
    return [real]


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
