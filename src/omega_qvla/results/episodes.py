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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from omega_qvla.errors import ResourceError, ResumeError

_SCHEMA = 2
_LABELS = ("policy", "recipe", "condition")
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
        states: the robot's state at each chunk, [chunks, state_dim], rounded to five decimals.
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


def per_task(episodes: Iterable[EpisodeRecord]) -> dict[str, tuple[int, int]]:
    """Successes and episodes of every task."""
    counts: dict[str, tuple[int, int]] = {}
    for record in episodes:
        solved, count = counts.get(record.task, (0, 0))
        counts[record.task] = solved + record.success, count + 1
    return counts


_RECORD = TypeAdapter(EpisodeRecord)
_NAMES = {one.name for one in fields(EpisodeRecord)}


class JournalDamage(ValueError):  # noqa: N818 - what is said is the damage
    """A line that cannot be read, before the last one, or a header that is not understood."""


@dataclass(frozen=True)
class Journal:
    """The lines of a journal, less one that a crash has torn.

    Attributes:
        entries: the header and the episodes; None for a line that cannot be read.
        size: bytes up to the end of the last whole line.
    """

    entries: list[dict[str, Any] | None]
    size: int

    @property
    def header(self) -> dict[str, Any]:
        """The first line; empty where there is none that can be read."""
        return (self.entries[0] if self.entries else None) or {}

    def records(self) -> dict[tuple[str, int], EpisodeRecord]:
        """Finished episodes by (task, seed).

        Raises:
            JournalDamage: a line before the last one cannot be read.
        """
        found: dict[tuple[str, int], EpisodeRecord] = {}
        for number, entry in enumerate(self.entries[1:], start=2):
            record = _record(entry)
            if record is None:
                raise JournalDamage(f"line {number} is damaged")
            found.setdefault(record.key, record)
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What was evaluated: ``policy``, ``recipe``, ``condition`` and more.

        Raises:
            JournalDamage: the header does not say it, or is of another schema.
        """
        schema, identity = self.header.get("schema"), self.header.get("identity")
        if schema != _SCHEMA:
            raise JournalDamage(f"the journal has schema {schema!r}; this version reads {_SCHEMA}")
        if not isinstance(identity, dict) or any(
            not isinstance(identity.get(key), str) for key in _LABELS
        ):
            raise JournalDamage(f"the journal does not say which {', '.join(_LABELS)} it is")
        return cast(dict[str, Any], identity)


def is_journal(content: bytes) -> bool:
    """Whether a file's first line is the header of an episode journal."""
    header = _parse(content.split(b"\n", 1)[0])
    return header is not None and "identity" in header and "environment" in header


def parse_journal(content: bytes) -> Journal:
    """The lines of a journal; a last one that a crash has torn is left out."""
    lines = content.split(b"\n")[:-1]
    entries = [_parse(line) for line in lines]
    if entries and entries[-1] is None:
        del lines[-1], entries[-1]
    return Journal(entries, sum(len(line) + 1 for line in lines))


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
        found = parse_journal(data)
        if found.size < len(data):
            os.ftruncate(self._descriptor, found.size)
        if not found.entries:
            self._write_line(header)
            return
        self._check_header(found.header, header)
        try:
            self.records = found.records()
        except JournalDamage as error:
            raise ResumeError(
                f"{error} in the journal {self.path}; remove the file to evaluate again"
            ) from error

    def _check_header(self, found: dict[str, Any], expected: dict[str, Any]) -> None:
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
    except (ValueError, RecursionError):
        return None
    return cast(dict[str, Any], entry) if isinstance(entry, dict) else None


def _record(entry: dict[str, Any] | None) -> EpisodeRecord | None:
    if entry is None or not _NAMES - _ADDED_LATER <= set(entry) <= _NAMES:
        return None
    try:
        return _RECORD.validate_python(entry)
    except ValidationError:
        return None
