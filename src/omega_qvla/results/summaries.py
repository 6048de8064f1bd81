"""What `report` and `serve` say at their end."""

from __future__ import annotations

from omega_qvla.results.document import Count, Document, Part


class ReadFile(Part):
    """A file that a report was made of.

    Attributes:
        file: its name.
        kind: what it holds.
        sha256: of its bytes.
    """

    file: str
    kind: str
    sha256: str


class ReportSummary(Document):
    """A report that was written.

    Attributes:
        report: the HTML file.
        bytes: its size.
        figures: the PNG files beside it.
        notes: what the report says about the mixture of its inputs.
        gaps: parts with nothing to show.
        files: what it was made of.
    """

    report: str
    bytes: Count
    figures: list[str]
    notes: list[str]
    gaps: list[str]
    files: list[ReadFile]


class Served(Document):
    """A server that has ended.

    Attributes:
        artifact: content hash; null in full precision.
        requests: how they ended: `answered` or the
            [error](serving-protocol.md#error-codes-of-the-server).
        action_violations: by rule.
        connections: by event.
        batches: by size.
        drained: whether everything on its way was finished.
    """

    artifact: str | None
    requests: dict[str, Count]
    action_violations: dict[str, Count]
    connections: dict[str, Count]
    batches: dict[str, Count]
    drained: bool
