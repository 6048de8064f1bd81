"""The left-over of the previous chunk, from the robot's units to what guides the network.

The way back of what a policy returns: the state of the *new* observation is subtracted where
actions are relative to it (the old chunk was relative to another state), then they are normalized,
and padded with zeros to the network's horizon and width.  The padding beyond the robot's own
dimensions is guided to zero, as LeRobot does.

A dimension without spread cannot come back: normalizing divides by next to nothing, and the last
bit of a float32 action becomes a large number.  Where one such bit moves the normalized action by
more than ``RESOLUTION`` the dimension is not guided.
"""

from __future__ import annotations

import numpy as np

from omega_qvla.errors import ObservationError
from omega_qvla.policies.guidance import Guidance
from omega_qvla.policies.processing.normalization import Normalization
from omega_qvla.policies.processing.relative_actions import Mask, to_relative
from omega_qvla.real_time_chunking import LeftOver, RealTimeChunking

RESOLUTION = 1e-2
"""Of normalized actions, which are about 1: less than four bits of them, more than rounding."""


def encode_left_over(
    left_over: LeftOver,
    chunking: RealTimeChunking,
    anchor: np.ndarray | None,
    relative: Mask,
    normalization: Normalization,
    shape: tuple[int, int],
    width: int,
) -> Guidance:
    """One row of guidance.

    Args:
        left_over: in the robot's units.
        chunking: how it is continued.
        anchor: [state_dim] what relative actions of the new observation are counted from.
        relative: which actions are.
        normalization: of the actions.
        shape: (horizon, action_dim) of the network.
        width: of the robot's actions, at most ``action_dim``.

    Raises:
        ObservationError: longer than a chunk, or of another width.
    """
    actions = left_over.actions
    if actions.shape[1] != width or len(actions) > shape[0]:
        raise ObservationError(
            f"previous must be [at most {shape[0]}, {width}], the unexecuted part of a chunk of "
            f"this policy; got {list(actions.shape)}"
        )
    normalized, beside = (
        normalization.normalize(to_relative(values, anchor, relative))
        for values in (actions, np.nextafter(actions, np.float32(np.inf)))
    )
    lost = np.flatnonzero((np.abs(beside - normalized) > RESOLUTION).any(axis=0))
    normalized[:, lost] = 0.0
    guidance = Guidance.to(LeftOver(normalized, left_over.delay), chunking, shape)
    guidance.weights[..., lost] = 0.0
    return guidance
