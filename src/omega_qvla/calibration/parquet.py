"""Parquet, as little of it as is needed.

Only the columns that are asked for are decoded, a few thousand rows at a time and through a
buffered stream, so that memory does not grow with the size of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from omega_qvla.errors import ObservationError
from omega_qvla.extras import needing

_BUFFER_BYTES = 1 << 20
_NUMBER_ROWS = 4096
_IMAGE_ROWS = 8


def read_columns(
    path: Path, where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """All rows of a small table, column by name.

    Raises:
        ObservationError: unreadable, or a required column is missing.
        ResourceError: pyarrow is not installed.
    """
    with open_parquet(path, where) as file:
        names = set(file.schema_arrow.names)
        missing = [name for name in required if name not in names]
        if missing:
            raise ObservationError(f"{where} has no column {', '.join(missing)}")
        columns = [*required, *(name for name in optional if name in names)]
        for batch in file.iter_batches(batch_size=_NUMBER_ROWS, columns=columns):
            yield from batch.to_pylist()


def read_rows(
    path: Path,
    where: str,
    rows: Sequence[int],
    columns: Sequence[str],
    *,
    batch_rows: int = _NUMBER_ROWS,
) -> dict[int, dict[str, Any]]:
    """Some rows of a table, by their number in the file; rows past its end are left out.

    Row groups without any of them are not touched.

    Raises:
        ObservationError: unreadable, or a column is missing.
    """
    found: dict[int, dict[str, Any]] = {}
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    with open_parquet(path, where) as file:
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ObservationError(
                f"{where} has no column {', '.join(missing)}; it has "
                f"{', '.join(file.schema_arrow.names)}"
            )
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            inside = wanted[(wanted >= begin) & (wanted < end)]
            if len(inside):
                found |= _pick(file, group, begin, inside, columns, batch_rows)
            begin = end
    return found


def read_image_row(path: Path, where: str, row: int, column: str) -> Any:
    """One cell of a column of encoded images.

    Raises:
        ObservationError: unreadable, or neither column nor row is there.
    """
    found = read_rows(path, where, [row], [column], batch_rows=_IMAGE_ROWS)
    if row not in found:
        raise ObservationError(f"{where} has no row {row}")
    return found[row][column]


def episode_rows(path: Path, where: str, episode: int) -> np.ndarray:
    """The rows of a table that belong to one episode, int64 ascending.

    Raises:
        ObservationError: unreadable, or without ``episode_index``.
    """
    found, begin = [], 0
    with open_parquet(path, where) as file:
        if "episode_index" not in file.schema_arrow.names:
            raise ObservationError(f"{where} has no column episode_index")
        for batch in file.iter_batches(batch_size=65536, columns=["episode_index"]):
            values = batch.column(0).to_numpy(zero_copy_only=False)
            found.append(np.flatnonzero(values == episode) + begin)
            begin += len(values)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def column_names(path: Path, where: str) -> list[str]:
    """The columns of a table.

    Raises:
        ObservationError: unreadable.
    """
    with open_parquet(path, where) as file:
        return list(file.schema_arrow.names)


@contextmanager
def open_parquet(path: Path, where: str) -> Iterator[Any]:
    """An open ``pyarrow.parquet.ParquetFile``; failures inside the block name ``where``.

    Raises:
        ObservationError: missing, or not readable as parquet.
        ResourceError: pyarrow is not installed.
    """
    with needing("reading a LeRobot dataset", "data"):
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    if not path.is_file():
        raise ObservationError(f"{where} is missing; the dataset was not downloaded whole")
    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True) as file:
            yield file
    except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or ["no details"])[0]
        raise ObservationError(
            f"cannot read {where}: {first}; it may be half-downloaded or damaged"
        ) from error


def _pick(
    file: Any,
    group: int,
    begin: int,
    wanted: np.ndarray,
    columns: Sequence[str],
    batch_rows: int,
) -> dict[int, dict[str, Any]]:
    """Rows ``wanted`` (numbers in the file, ascending) of a row group that starts at ``begin``."""
    found: dict[int, dict[str, Any]] = {}
    batches = file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=list(columns))
    for batch in batches:
        end = begin + batch.num_rows
        for number in wanted[(wanted >= begin) & (wanted < end)]:
            (found[int(number)],) = batch.slice(int(number) - begin, 1).to_pylist()
        begin = end
        if begin > wanted[-1]:
            break
    return found
