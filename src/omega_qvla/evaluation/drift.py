"""Long-horizon drift: how far the robot's hand is from where full precision has it by then.

Two policies start an episode from the same state with the same noises, and every action moves the
robot to where the next observation is taken.  A small action error is therefore corrected by what
the policy sees, or it grows.  After k control steps the drift of an episode is

    d_k = ‖p_k - q_k‖   (metres),

p and q the hand's positions under the two policies: the first three numbers of the state, in every
environment here.  Only episodes in which both are still running after k steps count, so the number
of pairs shrinks with k.  Robots are chaotic where they touch things: full precision with rounding
errors of another order drifts too, which is what the full precision of an outlier-injected policy
shows against the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omega_qvla.results.episodes import EpisodeRecord
from omega_qvla.results.rows import HandDrift

DRIFT_STEPS = (25, 50, 100)
"""Control steps after which the hands are compared."""
_POSITION = 3


def hand_drift(
    ours: Sequence[EpisodeRecord], theirs: Sequence[EpisodeRecord], execute: int
) -> dict[str, HandDrift]:
    """Drift over paired episodes.

    Args:
        ours, theirs: records of the same episodes in the same order.
        execute: control steps between two recorded states.

    Returns:
        By control steps, as a string; steps that no pair reached are left out.

    Raises:
        ValueError: not the same episodes.
    """
    if [record.key for record in ours] != [record.key for record in theirs]:
        raise ValueError("drift compares the same episodes in the same order")
    found: dict[str, HandDrift] = {}
    for steps in DRIFT_STEPS:
        index, off = divmod(steps, execute)
        distances = [
            float(np.linalg.norm(np.subtract(a.states[index], b.states[index])[:_POSITION]))
            for a, b in zip(ours, theirs, strict=True)
            if not off and index < min(len(a.states), len(b.states))
        ]
        if distances:
            median, high = np.quantile(distances, (0.5, 0.9)).round(5).tolist()
            count = len(distances)
            found[str(steps)] = HandDrift(median_m=median, p90_m=high, episodes=count)
    return found
