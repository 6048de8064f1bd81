"""Actions that are differences from the robot's state, and the way back to absolute ones.

openpi calls them delta actions, LeRobot relative ones.  For a chunk a [H, A] in the robot's units,
the state s at the moment of prediction and a mask m over the first dimensions,

    absolute[t, i] = a[t, i] + m[i] · s[i],

with the same state for the whole chunk.  Statistics of such actions are statistics of the
differences, so the state is added after unnormalizing.  Dimensions beyond the mask are absolute.

Source: openpi ``transforms.py`` (``AbsoluteActions``); LeRobot ``relative_action_processor.py``,
whose steps normalize after subtracting and add after unnormalizing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omega_qvla.errors import PolicyError

Mask = tuple[bool, ...]
"""Per leading action dimension, whether it is relative; empty: all actions are absolute."""


def relative_mask(width: int, names: Sequence[str] | None, exclude: Sequence[str]) -> Mask:
    """Which actions are relative, by LeRobot's rule.

    Args:
        width: dimensions of the robot's actions.
        names: their names; None, or too few, leaves the unnamed ones relative.
        exclude: a dimension stays absolute if its name contains one of these, in either case.
    """
    tokens = [token.lower() for token in exclude if token]
    named = [not any(token in name.lower() for token in tokens) for name in (names or ())[:width]]
    return (*named, *[True] * (width - len(named)))


def to_relative(actions: np.ndarray, state: np.ndarray | None, mask: Mask) -> np.ndarray:
    """The inverse of ``to_absolute``, to the same arguments; float64.

    Raises:
        PolicyError: some actions are relative and there is no state.
    """
    relative = np.asarray(actions, np.float64)
    if not any(mask):
        return relative
    relative = relative.copy()
    relative[..., : len(mask)] -= np.where(mask, _required(state)[: len(mask)], 0.0)
    return relative


def to_absolute(actions: np.ndarray, state: np.ndarray | None, mask: Mask) -> np.ndarray:
    """Actions in the robot's units, absolute.

    Args:
        actions: [..., A] float32 in the robot's units, those of ``mask`` relative.
        state: [S] float32 at the moment of prediction; not needed where all actions are absolute.
        mask: at most min(A, S) dimensions.

    Raises:
        PolicyError: some actions are relative and there is no state.
    """
    if not any(mask):
        return actions
    absolute = actions.copy()
    absolute[..., : len(mask)] += np.where(mask, _required(state)[: len(mask)], np.float32(0.0))
    return absolute


def _required(state: np.ndarray | None) -> np.ndarray:
    if state is None:
        raise PolicyError("these actions are relative to the state of the robot, which is missing")
    return state


def describe_actions(mask: Mask, names: Sequence[str] | None) -> str:
    """Which actions are relative, for the user.

    Args:
        mask: of the actions.
        names: their names, where they have some.
    """
    if not any(mask):
        return "absolute"
    labels = [*(names or ()), *map(str, range(len(names or ()), len(mask)))]
    kept = [label for label, relative in zip(labels, mask, strict=False) if not relative]
    return "relative to the state" + (f", but {', '.join(kept)}" if kept else "")
