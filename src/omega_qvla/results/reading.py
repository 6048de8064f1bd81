"""Reading saved results: every kind is told apart by its keys and checked once, here.

What cannot be understood is an error that names the file and the place in it.  An unfinished
comparison is read from the journal of one of its rows.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from omega_qvla.errors import ResultError
from omega_qvla.results.diagnostics import Diagnostics
from omega_qvla.results.document import SCHEMA, Document
from omega_qvla.results.episodes import JournalDamage, is_journal, parse_journal, per_task
from omega_qvla.results.memory import Inspection
from omega_qvla.results.rows import Comparison, Evaluation, Row, is_smoke
from omega_qvla.results.speed import KernelBench, PolicyBench
from omega_qvla.results.statistics import wilson_interval

UNDERSTOOD = (
    "results of compare, demo, eval, diagnose, inspect, quantize, bench, and the journals of a "
    "comparison (*.jsonl)"
)
MAX_FILE_BYTES = 256 * 2**20

Saved = Comparison | Evaluation | Diagnostics | Inspection | PolicyBench | KernelBench
KINDS: Mapping[str, type[Saved]] = {
    "comparison": Comparison,
    "evaluation": Evaluation,
    "diagnostics": Diagnostics,
    "memory": Inspection,
    "policy speed": PolicyBench,
    "kernels": KernelBench,
}
JOURNAL = "journal of an unfinished run"

_Model = TypeVar("_Model", bound=BaseModel)
_Document = TypeVar("_Document", bound=Document)


def read_bytes(path: str | Path) -> bytes:
    """The content of a saved result.

    Raises:
        ResultError: no such file, larger than any result, or it cannot be read.
    """
    source = Path(path)
    try:
        if not source.is_file():
            problem = "no such file" if not source.exists() else "no file"
            raise ResultError(f"{source}: {problem}")
        if source.stat().st_size > MAX_FILE_BYTES:
            raise ResultError(f"{source} is larger than {MAX_FILE_BYTES >> 20} MiB: no result")
        return source.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {source}: {error}") from error


def parse(content: bytes, where: str) -> tuple[str, Saved | Row | None]:
    """What a file holds: its kind, and the document.

    Args:
        content: of the file.
        where: its name, for messages.

    Returns:
        A name of ``KINDS`` and its document; or ``JOURNAL`` and the row of its finished episodes,
        None if there are none yet.

    Raises:
        ResultError: no JSON, of no known kind, of another schema, or a value is missing or wrong.
    """
    if is_journal(content):
        return JOURNAL, _row_of_journal(content, where)
    document = _json_object(content, where)
    kind = _kind(document)
    if kind is None:
        keys = ", ".join(sorted(document)[:6]) or "nothing"
        raise ResultError(f"{where} is of no known kind (keys: {keys}); known: {UNDERSTOOD}")
    _require_schema(document, where)
    return kind, validated(KINDS[kind], document, where)


def load_comparison(path: str | Path) -> Comparison:
    """A saved comparison that has rows.

    Raises:
        ResultError: the file cannot be read, holds something else, or no rows.
    """
    kind, found = parse(read_bytes(path), str(path))
    if not isinstance(found, Comparison):
        raise ResultError(f"{path} is no saved comparison ({kind})")
    if not found.rows:
        raise ResultError(f"{path} holds no rows")
    return found


def load_as(model: type[_Document], path: str | Path, writer: str) -> _Document:
    """A file that must be of one kind.

    Args:
        model: what it must hold.
        writer: what writes such files.

    Raises:
        ResultError: it cannot be read, or is not what ``writer`` writes.
    """
    document = _json_object(read_bytes(path), str(path))
    _require_schema(document, str(path))
    try:
        return validated(model, document, str(path))
    except ResultError as error:
        raise ResultError(f"{error}; give what {writer} writes") from error


def validated(model: type[_Model], value: Any, where: str) -> _Model:
    """A value as a part of a document.

    Raises:
        ResultError: names the first place that is wrong, and how many there are.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        more = error.error_count() - 1
        tail = f" (and {more} more)" if more else ""
        raise ResultError(f"{where}, {place}: {first['msg']}{tail}") from error


def _json_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ResultError(f"{where} is no saved result; known: {UNDERSTOOD}")
    return cast(dict[str, Any], document)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def _require_schema(document: Mapping[str, Any], where: str) -> None:
    if document.get("schema") != SCHEMA:
        raise ResultError(
            f"{where} has schema {document.get('schema')!r}; this version reads {SCHEMA}: make it "
            "again with this version, or read it with the version that made it"
        )


def _kind(document: Mapping[str, Any]) -> str | None:
    if document.get("kind") == "diagnostics":
        return "diagnostics"
    if isinstance(document.get("row"), dict):
        return "evaluation"
    if "components" in document and "total_bytes" in document:
        return "memory"
    rows = document.get("rows")
    if not isinstance(rows, list):
        return None
    first: Any = rows[0] if rows and isinstance(rows[0], dict) else {}
    if "summary" in document or "median_us" in first:
        return "kernels"
    if "vision_ms" in first or (not rows and "machine" in document):
        return "policy speed"
    if "success" in first or "policy" in document:
        return "comparison"
    return None


def _row_of_journal(content: bytes, where: str) -> Row | None:
    try:
        journal = parse_journal(content)
        labels, records = journal.identity, list(journal.records().values())
    except JournalDamage as error:
        raise ResultError(f"{where}: {error}") from error
    if not records:
        return None
    success = per_task(records)
    solved = sum(record.success for record in records)
    return Row(
        policy=labels["policy"],
        recipe=labels["recipe"],
        condition=labels["condition"],
        realizable=True,
        success=success,
        success_mean=solved / len(records),
        success_ci95=wilson_interval(solved, len(records)),
        action_error=None,
        noise_floor=None,
        action_error_ci95=None,
        action_errors=None,
        error_vs_default=None,
        noises=None,
        smoothness=None,
        drift=None,
        checkpoint_bytes=None,
        resident_bytes=None,
        ms_per_chunk=statistics.median(record.ms_per_chunk for record in records),
        seeds=sorted({record.seed for record in records}),
        episodes=len(records),
        smoke=is_smoke(success),
        paired_vs_reference=None,
        scope=labels.get("scope"),
        unfinished=True,
    )
