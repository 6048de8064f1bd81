"""What `report` and `serve` say at their end; what `recipes` and `doctor` list."""

from __future__ import annotations

from typing import Literal

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
        figures: the PNG files that were asked for.
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


class RecipeLine(Part):
    """A recipe there is.

    Attributes:
        name: what `--recipe` takes.
        description: one line.
        bits: of weights and activations where it quantizes.
        left_in_16_bits: what it leaves as it is, or adds.
        realizable: its integers can be stored and multiplied; else it is a simulation.
        paper: where it is from, as an arXiv number; null: this project's own.
        default: it is taken where none is named.
    """

    name: str
    description: str
    bits: str
    left_in_16_bits: list[str]
    realizable: bool
    paper: str | None
    default: bool


class RecipeList(Document):
    """The recipes there are.

    Attributes:
        recipes: by name.
    """

    recipes: list[RecipeLine]


class Check(Part):
    """One thing a machine has, or has not.

    Attributes:
        name: of the thing.
        state: `absent` is no fault: what needs it says how to get it; `broken` is one.
        found: what there is, or what to do.
    """

    name: str
    state: Literal["ok", "absent", "broken"]
    found: str


class Checkup(Document):
    """A machine, looked at.

    Attributes:
        checks: of everything.
        ok: nothing is broken; the exit status is 1 otherwise.
    """

    checks: list[Check]
    ok: bool
