"""What a report is made of: saved results of every kind, kept apart.

Nothing is lost on the way in.  Files that cannot be understood are all named in one error, before
anything is written; two files that say different things of the same row stay two rows; an
unfinished comparison comes in through its journals, marked as such; and whatever a reader has to
know about the mixture becomes a note in the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omega_qvla.errors import ResultError
from omega_qvla.results.diagnostics import Diagnostics
from omega_qvla.results.memory import Inspection, Memory
from omega_qvla.results.reading import UNDERSTOOD, Saved, parse, read_bytes
from omega_qvla.results.rows import Comparison, Evaluation, Row
from omega_qvla.results.speed import KernelBench, KernelSummary, PolicyBench, PolicySpeed
from omega_qvla.results.summaries import ReadFile


@dataclass(frozen=True)
class Sourced:
    """Where something comes from, and on which machine it was measured where that matters."""

    file: str
    machine: str = ""


@dataclass
class Sources:
    """Everything that was read, in the order of the files.

    Attributes:
        files: name, kind and SHA-256 of every file.
        results: rows of comparisons, evaluations and journals.
        memories: (label, table).
        notes: what a reader has to know about the mixture.
        versions: the library's version → files that it wrote, where they say so.
    """

    files: list[ReadFile] = field(default_factory=list[ReadFile])
    results: list[Row] = field(default_factory=list[Row])
    diagnostics: list[Diagnostics] = field(default_factory=list[Diagnostics])
    memories: list[tuple[str, Memory]] = field(default_factory=list[tuple[str, Memory]])
    policy_speeds: list[tuple[Sourced, list[PolicySpeed]]] = field(
        default_factory=list[tuple[Sourced, list[PolicySpeed]]]
    )
    kernel_speeds: list[tuple[Sourced, list[KernelSummary]]] = field(
        default_factory=list[tuple[Sourced, list[KernelSummary]]]
    )
    notes: list[str] = field(default_factory=list[str])
    versions: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show at all."""
        return not (
            self.results
            or self.diagnostics
            or self.memories
            or any(rows for _, rows in self.policy_speeds)
            or any(rows for _, rows in self.kernel_speeds)
        )


def read_sources(paths: Sequence[str | Path]) -> Sources:
    """Read saved results of any kind.

    Raises:
        ResultError: no files, nothing in them, or files that cannot be used: all of them are named.
    """
    if not paths:
        raise ResultError(f"give at least one file; a report is made of {UNDERSTOOD}")
    sources, failures = Sources(), list[str]()
    for path in dict.fromkeys(Path(path) for path in paths):
        try:
            content = read_bytes(path)
            kind, found = parse(content, str(path))
        except ResultError as error:
            failures.append(str(error))
            continue
        digest = hashlib.sha256(content).hexdigest()
        sources.files.append(ReadFile(file=path.name, kind=kind, sha256=digest))
        _add(found, path, sources)
    if failures:
        raise ResultError(
            "nothing was written; leave these files out or make them again:\n  "
            + "\n  ".join(failures)
        )
    _separate_conflicts(sources)
    _note_versions(sources)
    if sources.empty:
        names = ", ".join(str(path) for path in paths)
        raise ResultError(f"there is nothing to report: {names} hold no rows")
    return sources


def _add(found: Saved | Row | None, path: Path, sources: Sources) -> None:
    rows: Sequence[Row] = ()
    if found is None:
        sources.notes.append(f"{path.name}: no episode has been finished yet")
    elif isinstance(found, Row):
        rows = [found]
    elif isinstance(found, Evaluation):
        rows = [found.row]
    elif isinstance(found, Comparison):
        rows = found.rows
        if not rows:
            sources.notes.append(f"{path.name} holds no rows")
    elif isinstance(found, Diagnostics):
        sources.diagnostics.append(found)
    elif isinstance(found, Inspection):
        name = (found.recipe or {}).get("name") or "policy"
        sources.memories.append((f"{name} ({path.stem})", found))
    elif isinstance(found, PolicyBench):
        sources.policy_speeds.append((_measured_on(path, found), found.rows))
    else:
        sources.kernel_speeds.append((_measured_on(path, found), found.summary))
    sources.results += [row.model_copy(update={"source": path.name}) for row in rows]
    if isinstance(found, Diagnostics | PolicyBench | KernelBench):
        sources.versions.setdefault(found.library, []).append(path.name)


def _measured_on(path: Path, bench: PolicyBench | KernelBench) -> Sourced:
    threads = "1 thread" if bench.threads == 1 else f"{bench.threads} threads"
    return Sourced(path.name, f"{bench.machine}, {threads}")


def _separate_conflicts(sources: Sources) -> None:
    """Rows that say different things under one name get their file's name; equal ones are one."""
    by_name: dict[tuple[str, ...], list[Row]] = {}
    for row in sources.results:
        rivals = by_name.setdefault(row.cell, [])
        if all(row.model_copy(update={"source": known.source}) != known for known in rivals):
            rivals.append(row)
    kept: list[Row] = []
    for rivals in by_name.values():
        finished = [row for row in rivals if not row.unfinished]
        if finished and len(finished) < len(rivals):
            left_out = ", ".join(row.source for row in rivals if row.unfinished)
            sources.notes.append(f"{left_out}: left out, a finished run has the same row")
            rivals = finished
        if len(rivals) > 1:
            files = ", ".join(row.source for row in rivals)
            sources.notes.append(
                f"{rivals[0].recipe}, {rivals[0].condition}: {files} differ; all are shown, each "
                "under its file's name"
            )
            rivals = [
                row.model_copy(update={"recipe": f"{row.recipe} [{row.source}]"}) for row in rivals
            ]
        kept += rivals
    sources.results = kept
    unfinished = [row for row in kept if row.unfinished]
    if unfinished:
        names = ", ".join(f"{row.recipe}, {row.condition}" for row in unfinished)
        sources.notes.append(
            f"unfinished: {names}. Only the episodes finished so far are counted, and rows with "
            "other episodes are not comparable seed by seed"
        )


def _note_versions(sources: Sources) -> None:
    if len(sources.versions) > 1:
        parts = [f"{version}: {', '.join(names)}" for version, names in sources.versions.items()]
        sources.notes.append(f"the files come from several versions ({'; '.join(parts)})")
