"""What a policy takes in bytes, and what an artifact says of itself."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from omega_qvla.results.document import Count, Document, Measured, Number, Part


class Component(Part):
    """One part of the checkpoint.

    Attributes:
        name: of the part.
        params: parameters of the original checkpoint that it stands for.
        bits: average per parameter.
        bytes: what storing it takes, scales and transforms included.
        reference_bytes: what the part takes in 16 bits.
    """

    name: str
    params: Count
    bits: Measured
    bytes: Count
    reference_bytes: Count


class Memory(Part):
    """A memory table.

    Attributes:
        components: one per part of the checkpoint.
        total_bytes: the whole checkpoint.
        reference_bytes: the original checkpoint in 16 bits, parameters that inference never reads
            included.
        reduction: 1 − total / reference.
        paper_scope_reduction: the same over the linears of backbone and action head alone, as the
            paper counts.
    """

    components: list[Component] = Field(min_length=1)
    total_bytes: Count
    reference_bytes: Count
    reduction: Number | None
    paper_scope_reduction: Number | None


class HeldOut(Part):
    """A glance at a new artifact's actions.

    Attributes:
        observations: how many.
        noises: of each of them.
        seen_in_calibration: they were used for calibration, since there were no others.
        action_error: of the artifact, against full precision.
        rtn_error: of the same policy rounded to nearest; null where that is what the artifact is.
        noise_floor: of full precision against itself, with two noises.
    """

    observations: Count
    noises: Count
    seen_in_calibration: bool
    action_error: Measured
    rtn_error: Measured | None
    noise_floor: Measured | None


class Inspection(Memory, Document):
    """An artifact, or a predicted one.

    Attributes:
        recipe: the recipe.
        kernel: the kernel that will run it.
        sites: the quantized sites in execution order.
        content_hash: of an artifact: SHA-256 over all of it.
        coverage: of a policy that LeRobot's own code runs: what of it becomes integers, what is
            kept in full precision and what is left out, each with ``what`` it is, the ``count`` of
            modules, their ``parameters`` and ``names``; null of native policies.
        decisions: of an artifact: what was decided about its checkpoint
            ([checkpoints.md](checkpoints.md)), question and answer.
        held_out: of `quantize`: its action error on a few observations; absent where it was not
            measured.
    """

    recipe: dict[str, Any] | None = None
    kernel: str | None = None
    sites: list[dict[str, Any]] | None = None
    content_hash: str | None = None
    decisions: dict[str, str] | None = None
    coverage: list[dict[str, Any]] | None = None
    held_out: HeldOut | None = None


class Failure(Part):
    """One thing that is wrong with an artifact.

    Attributes:
        file: which file.
        tensor: which tensor; null where a whole file is meant.
        reason: what is wrong.
    """

    file: str
    tensor: str | None
    reason: str


class Verification(Part):
    """What `verify` found.

    Attributes:
        ok: nothing failed; the exit status is 1 otherwise.
        checked: how many tensors and files were checked.
        failures: what failed.
    """

    ok: bool
    checked: Count
    failures: list[Failure]
