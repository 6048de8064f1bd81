"""Episode records and the journal that makes a long evaluation resumable.

The journal is a text file of JSON lines.  The first line says what is being evaluated; each further
line is one finished episode, appended by a single write and synced, so a crash can at worst tear
the last line, which is dropped on the next start.  An episode is identified by (task, seed): a
second line for the same one is ignored.  A journal that belongs to something else is refused with
the differences, and a lock keeps a second evaluation from writing to the same file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from omega_qvla.errors import ResourceError, ResumeError

_SCHEMA = 2
_ADDED_LATER = {"actions_sha256"}
"""What lines of this schema may lack."""


@dataclass(frozen=True)
class EpisodeRecord:
    """What one episode came to.

    Attributes:
        task, seed: the episode.
        success: whether the simulator reported the task solved.
        steps: control steps executed.
        chunks: action chunks the policy was asked for.
        jerk: mean squared third difference of the executed actions; None below four actions.
        ms_per_chunk: median milliseconds of the policy's passes, each divided by the episodes that
            shared it.
        states: the robot's state at each chunk, [chunks][state_dim], rounded to five decimals.
        reruns: how often the simulator died and the episode was started again.
        actions_sha256: of the executed actions, float32 [steps, action_dim] as they lie in memory:
            two episodes with the same one moved alike, bit for bit.  None in older journals.
    """

    task: str
    seed: int
    success: bool
    steps: int
    chunks: int
    jerk: float | None
    ms_per_chunk: float
    states: list[list[float]] = field(default_factory=list[list[float]], repr=False)
    reruns: int = 0
    actions_sha256: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """(task, seed), what two methods are paired by."""
        return self.task, self.seed


class EpisodeJournal:
    """Finished episodes on disk.

    Args:
        path: the file; created, with its folders, if missing.
        identity: JSON values that fix the outcome of an episode; a journal with other values is
            refused.

    Raises:
        ResumeError: the file belongs to something else, is damaged before its last line, or is in
            use.
        ResourceError: it cannot be written.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.records: dict[tuple[str, int], EpisodeRecord] = {}
        header = {"schema": _SCHEMA, **json.loads(json.dumps(dict(identity)))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise ResourceError(f"cannot open the journal {self.path}: {error}") from error
        try:
            self._lock()
            self._load(header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EpisodeJournal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, record: EpisodeRecord) -> None:
        """Write one finished episode; it is on disk when this returns."""
        if record.key not in self.records:
            self._write_line(asdict(record))
            self.records[record.key] = record

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResumeError(
                f"another evaluation is writing to the journal {self.path}; wait for it to finish "
                "or give another path"
            ) from error

    def _load(self, header: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        lines = data.split(b"\n")[:-1]
        entries = [_parse(line) for line in lines]
        if entries and entries[-1] is None:
            del lines[-1], entries[-1]
        intact = sum(len(line) + 1 for line in lines)
        if intact < len(data):
            os.ftruncate(self._descriptor, intact)
        if not entries:
            self._write_line(header)
            return
        self._check_header(entries[0], header)
        for number, entry in enumerate(entries[1:], start=2):
            record = None if entry is None else _record(entry)
            if record is None:
                raise ResumeError(
                    f"line {number} of the journal {self.path} is damaged; remove the file to "
                    "evaluate again"
                )
            self.records.setdefault(record.key, record)

    def _check_header(self, found: dict[str, Any] | None, expected: dict[str, Any]) -> None:
        found = found or {}
        differences = [
            f"{key}: journal {found.get(key)!r}, now {expected.get(key)!r}"
            for key in sorted({*found, *expected})
            if found.get(key) != expected.get(key)
        ]
        if differences:
            raise ResumeError(
                f"the journal {self.path} belongs to another evaluation ("
                f"{'; '.join(differences)}); give another path or remove the file"
            )

    def _write_line(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError("the line was written in part")
            os.fsync(self._descriptor)
        except OSError as error:
            raise ResourceError(f"cannot write the journal {self.path}: {error}") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return cast(dict[str, Any], entry) if isinstance(entry, dict) else None


def _record(entry: dict[str, Any]) -> EpisodeRecord | None:
    names = {field.name for field in fields(EpisodeRecord)}
    if not names - _ADDED_LATER <= set(entry) <= names:
        return None
    return EpisodeRecord(**entry)
