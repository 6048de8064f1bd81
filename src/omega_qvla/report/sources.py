"""What a report is made of: saved JSON of every kind, told apart, checked, and kept apart.

Nothing is lost on the way in.  Files that cannot be understood are all named in one error, before
anything is written; two files that say different things of the same row stay two rows; an
unfinished comparison comes in through its journals, marked as such; and whatever a reader has to
know about the mixture becomes a note in the report.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from omega_qvla.report.journals import is_journal, read_journal
from omega_qvla.results.rows import SCHEMA, ReportError, Result, parse_results

UNDERSTOOD = (
    "results of compare, demo, eval, diagnose, inspect, quantize, bench, and the journals of a "
    "comparison (*.jsonl)"
)
MAX_FILE_BYTES = 256 * 2**20
MAX_FRAME_BYTES = 512 * 2**10
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

Number = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Position = tuple[Number, Number, Number]


class _Part(BaseModel):
    """Frozen; keys of later versions are ignored, as docs/json.md promises they may come."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Site(_Part):
    """One quantized site; every list has one entry per denoising step, or just one."""

    name: str
    component: str
    per_step: bool
    times: list[Number] | None
    error: list[Size | None]
    local_error: list[Size | None]
    absmax: list[Size]
    rms: list[Size]
    transformed_absmax: list[Size]
    transformed_rms: list[Size]
    limit: list[Size] | None

    @model_validator(mode="after")
    def _is_complete(self) -> Site:
        lists = (self.error, self.local_error, self.absmax, self.rms)
        lists = (*lists, self.transformed_absmax, self.transformed_rms)
        given = [values for values in (*lists, self.limit, self.times) if values is not None]
        if not self.error or len({len(values) for values in given}) > 1:
            raise ValueError(f"{self.name}: one value per denoising step is wanted everywhere")
        return self

    @property
    def worst(self) -> float | None:
        """The largest error at this site, over steps."""
        return max((value for value in self.error if value is not None), default=None)

    @property
    def worst_local(self) -> float | None:
        """The largest error that this site itself adds, over steps."""
        return max((value for value in self.local_error if value is not None), default=None)


class Profile(_Part):
    """Largest magnitudes by channel at one site."""

    site: str
    component: str
    channels: int
    before: list[Size] = Field(min_length=1)
    after: list[Size] = Field(min_length=1)


class Track(_Part):
    """The path of the hand in one episode, metres."""

    recipe: str
    task: str
    seed: int
    success: bool
    steps: int
    positions: list[Position] = Field(min_length=1)


class Frame(_Part):
    """One picture of a film, base64."""

    step: int
    png: str

    @field_validator("png")
    @classmethod
    def _is_a_picture(cls, text: str) -> str:
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"not base64: {error}") from error
        if len(content) > MAX_FRAME_BYTES:
            raise ValueError(f"a picture of {len(content)} bytes; at most {MAX_FRAME_BYTES}")
        if not content.startswith((_PNG, _JPEG)):
            raise ValueError("neither PNG nor JPEG")
        return text

    @property
    def url(self) -> str:
        """The picture as a data URI."""
        kind = "jpeg" if self.png.startswith("/9j/") else "png"
        return f"data:image/{kind};base64,{self.png}"


class Film(_Part):
    """Pictures of one episode."""

    recipe: str
    task: str
    seed: int
    success: bool
    frames: list[Frame]


class Rollouts(_Part):
    """Episodes of full precision and of the recipe, on the same seeds."""

    episodes: list[Track]
    films: list[Film]


class Component(_Part):
    """One row of a memory table."""

    name: str
    params: int
    bytes: Size
    reference_bytes: Size


class Memory(_Part):
    """A memory table, of ``inspect`` or of diagnostics."""

    components: list[Component] = Field(min_length=1)
    total_bytes: Size
    reference_bytes: Size
    reduction: Number | None = None
    paper_scope_reduction: Number | None = None


class Diagnostics(_Part):
    """What ``diagnose`` wrote."""

    policy: str
    recipe: str
    scope: str
    condition: str
    realizable: bool
    observations: int
    action_error: Size
    noise_floor: Size
    sites: list[Site] = Field(min_length=1)
    profiles: list[Profile]
    memory: Memory | None
    rollouts: Rollouts | None
    library: str | None = None


class PolicySpeed(_Part):
    """One row of ``bench policy``."""

    policy: str
    precision: str
    kernel: str
    vision_ms: Size
    prefix_ms: Size
    denoise_ms: Size
    total_ms: Size
    steps: int | None = None
    horizon: int | None = None
    peak_rss_bytes: Size | None = None
    checkpoint_bytes: Size | None = None


class _PolicyBench(_Part):
    machine: str
    threads: int
    rows: list[PolicySpeed]
    library: str | None = None


class KernelSpeed(_Part):
    """One line of ``bench kernels``'s summary."""

    site: str
    gmacs: Size
    vs_fp32: Size
    vs_int8_dynamic: Size


class _KernelBench(_Part):
    machine: str
    threads: int
    summary: list[KernelSpeed]
    library: str | None = None


@dataclass(frozen=True)
class Sourced:
    """Where something comes from, and on which machine it was measured where that matters."""

    file: str
    machine: str = ""


@dataclass
class Sources:
    """Everything that was read, in the order of the files.

    Attributes:
        files: (name, kind, SHA-256) of every file.
        results: rows of comparisons, evaluations and journals.
        memories: (label, table).
        notes: what a reader has to know about the mixture.
        versions: the library's version → files that it wrote, where they say so.
    """

    files: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    results: list[Result] = field(default_factory=list[Result])
    diagnostics: list[Diagnostics] = field(default_factory=list[Diagnostics])
    memories: list[tuple[str, Memory]] = field(default_factory=list[tuple[str, Memory]])
    policy_speeds: list[tuple[Sourced, list[PolicySpeed]]] = field(
        default_factory=list[tuple[Sourced, list[PolicySpeed]]]
    )
    kernel_speeds: list[tuple[Sourced, list[KernelSpeed]]] = field(
        default_factory=list[tuple[Sourced, list[KernelSpeed]]]
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
        ReportError: no files, nothing in them, or files that cannot be used: all of them are named.
    """
    if not paths:
        raise ReportError(f"give at least one file; a report is made of {UNDERSTOOD}")
    sources, failures = Sources(), list[str]()
    for path in dict.fromkeys(Path(path) for path in paths):
        try:
            _read_one(path, sources)
        except ReportError as error:
            failures.append(str(error))
    if failures:
        raise ReportError(
            "nothing was written; leave these files out or make them again:\n  "
            + "\n  ".join(failures)
        )
    _separate_conflicts(sources)
    _note_versions(sources)
    if sources.empty:
        names = ", ".join(str(path) for path in paths)
        raise ReportError(f"there is nothing to report: {names} hold no rows")
    return sources


def _read_one(path: Path, sources: Sources) -> None:
    content = _bytes_of(path)
    digest = hashlib.sha256(content).hexdigest()
    if is_journal(content):
        result = read_journal(content, str(path))
        kind = "journal of an unfinished run"
        if result is None:
            sources.notes.append(f"{path.name}: no episode has been finished yet")
        else:
            sources.results.append(replace(result, source=path.name))
    else:
        kind = _dispatch(_document(path, content), path, sources)
    sources.files.append((path.name, kind, digest))


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ReportError(f"{path}: no such file" if not path.exists() else f"{path}: no file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ReportError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB: no saved result")
        return path.read_bytes()
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error}") from error


def _document(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ReportError(f"{path} is no saved result; a report is made of {UNDERSTOOD}")
    return cast(dict[str, Any], document)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def _dispatch(document: dict[str, Any], path: Path, sources: Sources) -> str:
    """Add a document to the sources; returns what kind it is."""
    kind = _kind(document)
    if kind is None:
        keys = ", ".join(sorted(document)[:6]) or "nothing"
        raise ReportError(f"{path} is of no known kind (keys: {keys}); known: {UNDERSTOOD}")
    if document.get("schema") != SCHEMA:
        raise ReportError(
            f"{path} has schema {document.get('schema')!r}; this version reads {SCHEMA}: make it "
            "again with this version, or the report with the version that made it"
        )
    if kind in ("comparison", "evaluation"):
        rows = document["rows"] if kind == "comparison" else [document["row"]]
        if not rows:
            sources.notes.append(f"{path.name} holds no rows")
        sources.results += [
            replace(row, source=path.name) for row in parse_results(rows, str(path))
        ]
    elif kind == "diagnostics":
        found = _parse(Diagnostics, document, path)
        sources.diagnostics.append(found)
    elif kind == "memory":
        memory = _parse(Memory, document, path)
        sources.memories.append((_memory_label(document, path), memory))
    elif kind == "policy speed":
        bench = _parse(_PolicyBench, document, path)
        sources.policy_speeds.append((_measured_on(path, bench), bench.rows))
    else:
        bench = _parse(_KernelBench, document, path)
        sources.kernel_speeds.append((_measured_on(path, bench), bench.summary))
    if isinstance(version := document.get("library"), str):
        sources.versions.setdefault(version, []).append(path.name)
    return kind


def _kind(
    document: Mapping[str, Any],
) -> Literal["comparison", "evaluation", "diagnostics", "memory", "policy speed", "kernels"] | None:
    if document.get("kind") == "diagnostics":
        return "diagnostics"
    if isinstance(document.get("row"), dict):
        return "evaluation"
    if "components" in document and "total_bytes" in document:
        return "memory"
    rows = document.get("rows")
    if not isinstance(rows, list):
        return None
    first = rows[0] if rows and isinstance(rows[0], dict) else {}
    if "summary" in document or "median_us" in first:
        return "kernels"
    if "vision_ms" in first or (not rows and "machine" in document):
        return "policy speed"
    if "success" in first or "policy" in document:
        return "comparison"
    return None


def _parse(model: Any, document: Mapping[str, Any], path: Path) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        raise ReportError(f"{path}, {where}: {first['msg']}{tail}") from error


def _memory_label(document: Mapping[str, Any], path: Path) -> str:
    recipe = document.get("recipe")
    name = cast(Mapping[str, Any], recipe).get("name") if isinstance(recipe, dict) else None
    return f"{name or 'policy'} ({path.stem})"


def _measured_on(path: Path, bench: _PolicyBench | _KernelBench) -> Sourced:
    threads = "1 thread" if bench.threads == 1 else f"{bench.threads} threads"
    return Sourced(path.name, f"{bench.machine}, {threads}")


def _separate_conflicts(sources: Sources) -> None:
    """Rows that say different things under one name get their file's name; equal ones are one."""
    by_name: dict[tuple[str, ...], list[Result]] = {}
    for row in sources.results:
        rivals = by_name.setdefault(row.key, [])
        if all(replace(row, source=known.source) != known for known in rivals):
            rivals.append(row)
    kept: list[Result] = []
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
            rivals = [replace(row, recipe=f"{row.recipe} [{row.source}]") for row in rivals]
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
