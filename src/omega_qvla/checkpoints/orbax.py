"""Directories that Orbax saved: which step is whole, and which arrays it has.

A step of Orbax's ``CheckpointManager`` is a directory with one folder per item.  The folder of a
tree of arrays holds

    _METADATA           the path of every array in the tree, and the zarr they are stored in
    manifest.ocdbt, d/  an OCDBT database (a B-tree in files): of each array
                        ``<path joined by dots>/.zarray`` (or ``zarr.json``) and its chunks

and beside the folders ``_CHECKPOINT_METADATA`` has the time at which the save was finished.  While
it is written, a step or an item has ``.orbax-checkpoint-tmp`` in its name.  All this is JSON and
names of files; the arrays are read by ``orbax_arrays.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omega_qvla.checkpoints.files import read_json
from omega_qvla.errors import PolicyError

ITEM = "params"
"""The item with the weights for inference."""

STEP, TREE, MANIFEST = "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"

_UNFINISHED = ".orbax-checkpoint-tmp"
_COPY = "the checkpoint was not copied whole, or not saved to the end"


def is_orbax(directory: Path) -> bool:
    """Whether a directory is Orbax's: a step, finished or not, an item of one, or several steps."""
    names = [path.name for path in directory.iterdir()]
    return (
        any(name in (STEP, TREE, MANIFEST) for name in names)
        or any(_UNFINISHED in name for name in (directory.name, *names))
        or any((directory / ITEM / name).exists() for name in (TREE, MANIFEST))
        or bool(_steps(directory))
    )


def is_step_with(directory: Path, array: str) -> bool:
    """Whether a directory is a step that has an array of this name.

    Raises:
        PolicyError: it is a step, and what lists its arrays is missing or damaged.
    """
    return is_orbax(directory) and array in array_paths(directory)


def require_finished(directory: Path) -> None:
    """Refuse what is no finished step of a training, and say what to give instead.

    Raises:
        PolicyError: an unfinished save; an item, or a folder of steps, in place of a step; a step
            without the item that holds the weights.
    """
    if _UNFINISHED in directory.resolve().name:
        raise _unfinished(directory, f"it has {_UNFINISHED} in its name")
    steps = _steps(directory)
    if steps:
        raise PolicyError(
            f"{directory} is a folder of a training's steps; give one of them: "
            f"{directory / str(max(map(int, steps)))}"
        )
    if not (directory / ITEM).is_dir():
        raise _no_weights(directory)
    if (directory / STEP).exists():
        committed = read_json(directory, STEP).get("commit_timestamp_nsecs")
        if committed is None:
            raise _unfinished(directory, f"{STEP} has no commit_timestamp_nsecs")


def array_paths(directory: Path) -> dict[str, str]:
    """The arrays of a step by its ``_METADATA``: name → path in the database.

    A name is the path in the tree joined by slashes.  The item's own name at the beginning and
    ``value`` at the end, which flax writes around a training's parameters, are left out where all
    arrays have them.

    Raises:
        PolicyError: the file is missing or describes no tree of arrays.
    """
    tree = _metadata(directory).get("tree_metadata")
    where = directory / ITEM / TREE
    if not isinstance(tree, dict) or not tree:
        raise PolicyError(f"{where} has no tree_metadata: {_COPY}")
    paths = [_path(entry, where) for entry in tree.values()]
    first = 1 if all(path[0] == ITEM for path in paths) else 0
    last = -1 if all(path[-1] == "value" for path in paths) else None
    return {"/".join(path[first:last]): ".".join(path) for path in paths}


def zarr_driver(directory: Path) -> str:
    """Which of tensorstore's drivers reads the arrays.

    Raises:
        PolicyError: the file is missing, or the arrays are not in a database.
    """
    metadata = _metadata(directory)
    if not (directory / ITEM / MANIFEST).exists():
        raise PolicyError(f"{directory / ITEM} has no {MANIFEST}: {_COPY}")
    return "zarr3" if metadata.get("use_zarr3") else "zarr"


def _metadata(directory: Path) -> Mapping[str, Any]:
    if not (directory / ITEM / TREE).exists():
        raise PolicyError(f"{directory / ITEM} has no {TREE}: {_COPY}")
    return read_json(directory, f"{ITEM}/{TREE}")


def _path(entry: Any, where: Path) -> tuple[str, ...]:
    keys = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or not keys:
        raise PolicyError(f"{where} has an entry without key_metadata: {entry!r:.80}")
    path = [key.get("key") if isinstance(key, dict) else None for key in keys]
    if not all(isinstance(key, str) and key for key in path):
        raise PolicyError(f"{where} has a path that is none: {keys!r:.80}")
    return tuple(map(str, path))


def _steps(directory: Path) -> list[str]:
    """The names of the steps in a folder of them."""
    return [
        path.name
        for path in directory.iterdir()
        if path.name.isdecimal() and any((path / name).exists() for name in (STEP, ITEM))
    ]


def _unfinished(directory: Path, why: str) -> PolicyError:
    return PolicyError(
        f"{directory} is a save that was not finished ({why}): give an earlier step of the training"
    )


def _no_weights(directory: Path) -> PolicyError:
    names = sorted(path.name for path in directory.iterdir())
    partial = [name for name in names if _UNFINISHED in name]
    if partial:
        return _unfinished(directory, f"it holds {partial[0]}")
    if TREE in names or MANIFEST in names:
        return PolicyError(
            f"{directory} is an item of a checkpoint; give the step it is in: "
            f"{directory.resolve().parent}"
        )
    return PolicyError(
        f"{directory} is a checkpoint of Orbax without the item {ITEM}/, where openpi's trainer "
        f"keeps the weights for inference; it has {', '.join(names) or 'nothing'}. It is another "
        "trainer's, or was not copied whole"
    )
