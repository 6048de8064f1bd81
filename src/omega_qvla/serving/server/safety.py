"""What may leave for a robot: finite, within limits, and no faster than allowed.

A chunk a [H, A] is checked per dimension j, in the robot's units:

    low_j ≤ a[t, j] ≤ high_j        and        |a[t+1, j] - a[t, j]| ≤ change_j

A violation is an error that names step, dimension, value and limit.  Nothing is clipped in silence:
an action beyond what the policy was trained to do says that something else is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import PolicyError, ServingError

Array = npt.NDArray[np.float64]
Violation = Literal["not_finite", "limits", "change"]
_TOLERANCE = 1e-6
"""Of a limit's size: actions are float32, limits are not."""


class UnsafeActionError(ServingError):
    """A chunk that must not reach a robot.

    Attributes:
        violation: which rule it breaks.
    """

    exit_status = 1

    def __init__(self, violation: Violation, message: str) -> None:
        super().__init__("unsafe_action", message)
        self.violation: Violation = violation


@dataclass(frozen=True)
class ActionLimits:
    """Limits per action dimension, in the robot's units; infinite where there is none.

    Attributes:
        low, high: [A].
        change: [A], between one action and the next.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    change: tuple[float, ...]

    def __post_init__(self) -> None:
        """The vectors must fit together.

        Raises:
            PolicyError: other lengths, NaN, low above high, or a negative change.
        """
        low, high, change = map(np.asarray, (self.low, self.high, self.change))
        if not len(self.low) == len(self.high) == len(self.change):
            raise PolicyError(
                f"action limits must have one number per dimension: low {len(self.low)}, high "
                f"{len(self.high)}, change {len(self.change)}"
            )
        if not bool((low <= high).all()) or not bool((change >= 0).all()):
            raise PolicyError(
                f"action limits need low ≤ high and change ≥ 0, got low {list(self.low)}, high "
                f"{list(self.high)}, change {list(self.change)}"
            )

    @classmethod
    def unlimited(cls, width: int) -> ActionLimits:
        """Anything finite."""
        return cls((-np.inf,) * width, (np.inf,) * width, (np.inf,) * width)

    def check(self, chunk: npt.NDArray[Any]) -> None:
        """Let a chunk [H, A] pass, or not.

        Raises:
            UnsafeActionError: it breaks a rule.
        """
        actions = np.asarray(chunk, dtype=np.float64)
        if actions.ndim != 2 or actions.shape[1] != len(self.low):
            raise ValueError(f"a chunk of shape {list(actions.shape)}, limits for {len(self.low)}")
        if self._clearly_within(actions):
            return
        _refuse_first(~np.isfinite(actions), actions, "not_finite", "is not a finite number")
        for limit, beyond, sign in ((self.low, "below", -1.0), (self.high, "above", 1.0)):
            bound = np.asarray(limit)
            excess = sign * (actions - bound) > _slack(bound)
            _refuse_first(excess, actions, "limits", f"is {beyond} its limit", bound)
        change = np.asarray(self.change)
        steps = np.abs(np.diff(actions, axis=0, prepend=actions[:1]))
        _refuse_first(
            steps > change + _slack(change),
            steps,
            "change",
            "is more than the action may change from one step to the next",
            change,
        )

    def _clearly_within(self, actions: Array) -> bool:
        """Whether a chunk [H, A] obeys the rules of a single action, and no other rule exists: the
        usual case, in three operations, because a robot waits.  False says nothing.
        """
        lowest, highest = self._reach
        within = (actions >= lowest) & (actions <= highest)  # false for NaN
        return not self._has_change and bool(within.all())

    @cached_property
    def _reach(self) -> tuple[Array, Array]:
        """The least and the greatest action [A] that may leave; both finite."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        largest = np.finfo(np.float64).max
        return (
            np.maximum(low - _slack(low), -largest),
            np.minimum(high + _slack(high), largest),
        )

    @cached_property
    def _has_change(self) -> bool:
        return bool(np.isfinite(self.change).any())

    def dump(self) -> dict[str, list[float | None]]:
        """For metadata: None where there is no limit."""
        return {
            name: [value if np.isfinite(value) else None for value in values]
            for name, values in (("low", self.low), ("high", self.high), ("change", self.change))
        }


def _slack(bound: Array) -> Array:
    return _TOLERANCE * (1.0 + np.abs(np.where(np.isfinite(bound), bound, 0.0)))


def _refuse_first(
    wrong: npt.NDArray[np.bool_],
    values: Array,
    violation: Violation,
    told: str,
    bound: Array | None = None,
) -> None:
    if not wrong.any():
        return
    step, dimension = map(int, np.argwhere(wrong)[0])
    limit = "" if bound is None else f" ({bound[dimension]:g})"
    raise UnsafeActionError(
        violation,
        f"the policy's action was withheld: step {step}, dimension {dimension}: "
        f"{values[step, dimension]:g} {told}{limit}; {int(wrong.sum())} of {wrong.size} values "
        "break this rule",
    )


def read_limits(path: Path, width: int) -> ActionLimits:
    """A user's limits: JSON with ``low`` and ``high``, and ``change`` if wanted.

    Each is a list with one number per action dimension, or null where there is no limit.

    Raises:
        PolicyError: unreadable, unknown keys, or not of the policy's width.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"cannot read the action limits {path}: {error}") from error
    if not isinstance(content, dict) or not set(cast(dict[str, Any], content)) <= _KEYS:
        raise PolicyError(f"{path} must be a JSON object with low, high and, if wanted, change")
    known = cast(dict[str, Any], content)
    return ActionLimits(
        _numbers(known.get("low"), width, -np.inf, f"{path}: low"),
        _numbers(known.get("high"), width, np.inf, f"{path}: high"),
        _numbers(known.get("change"), width, np.inf, f"{path}: change"),
    )


_KEYS = {"low", "high", "change"}


def _numbers(value: Any, width: int, absent: float, where: str) -> tuple[float, ...]:
    if value is None:
        return (absent,) * width
    items = cast(Sequence[Any], value)
    right = isinstance(value, list) and len(items) == width
    if not right or not all(item is None or type(item) in (int, float) for item in items):
        raise PolicyError(f"{where} must be a list of {width} numbers or nulls")
    return tuple(absent if item is None else float(item) for item in items)
