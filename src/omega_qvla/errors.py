"""One tree of errors.  Each message says what is wrong, where, and how to fix it.

``exit_status`` is what the command line returns: 1 a check failed, 2 bad input or usage,
3 not enough memory, disk or device, or a package that is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where a known word is close to what was typed, else nothing."""
    names = list(known)
    close = get_close_matches(word, names, n=1) or [
        name for name in names if min(len(name), len(word)) > 2 and word.startswith(name)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


class CalibrationWarning(UserWarning):
    """Observations that are unlike what the policy was trained on, with numbers."""


class OmegaError(Exception):
    """Base of every error this library raises on purpose."""

    exit_status = 2


class RecipeError(OmegaError):
    """A recipe does not exist, does not parse, or cannot do what was asked."""


class NotRealizableError(RecipeError):
    """A recipe that only exists as a simulation was asked for integers."""


class PolicyError(OmegaError):
    """A policy or checkpoint cannot be loaded or does not have what was asked of it."""


class ObservationError(OmegaError):
    """An observation or calibration set is empty, incomplete or misshaped."""


class NonFiniteError(OmegaError):
    """NaN or Inf in weights or activations; names site, step and observation."""

    exit_status = 1


class ArtifactError(OmegaError):
    """A directory is not a valid artifact, or its contents are damaged."""

    exit_status = 1


class NotAnArtifactError(ArtifactError):
    """The path does not look like an artifact at all."""

    exit_status = 2


class ResumeError(OmegaError):
    """Interrupted work cannot be continued: its inputs changed, or a part of it is gone."""


class ResultError(OmegaError):
    """A saved result cannot be read, or a report cannot be made from it."""


class UsageError(OmegaError):
    """An option has a value that it cannot have."""


class OutputError(OmegaError):
    """An output is there already and was not asked to be replaced, or another is writing it."""


class ResourceError(OmegaError):
    """Not enough memory, disk or device."""

    exit_status = 3


class MissingPackageError(ResourceError):
    """A package that this part of the library needs is not installed, or cannot be imported."""


class SimulatorUnavailable(OmegaError):  # noqa: N818 - a state of the machine, not a fault
    """The simulator or its renderer is not installed; names the package that brings it."""

    exit_status = 3


class SimulatorError(OmegaError):
    """A simulator does not do what is asked of one; says what it should return, and what it did."""


class ServingError(OmegaError):
    """A request that was not answered with actions.

    Attributes:
        code: why, for programs; ``docs/serving-protocol.md`` lists them.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class WireError(ServingError):
    """Bytes that are no acceptable message, or a value that no message can hold."""

    def __init__(self, message: str) -> None:
        super().__init__("malformed", message)
