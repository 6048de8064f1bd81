"""Which frames of which episodes a calibration set is made of.

Calibration has to see what the policy will see: every task, and each of them from beginning to end,
contacts included, not only the first frames.  The plan is stratified twice:

1. **Tasks.**  ``count`` frames are shared out evenly over the strata (an episode's stratum is what
   it was told to do), and those of a stratum evenly over its episodes.  What does not go round is
   given to strata and episodes in a drawn order; what a short episode cannot take goes to others.
2. **Time.**  An episode of L frames that gives k of them gives frames ⌊L (i + φ) / k⌋ for
   i = 0 … k−1: evenly spaced, from a phase φ in [0, 1).  The phases of the M episodes in the plan
   are themselves stratified, (π(j) + u) / M with a drawn permutation π and u uniform in [0, 1), so
   that even one frame per episode covers whole episodes: early in some, late in others.

An episode gives at most every second of its frames.  Neighbouring frames say the same thing, and
the ``heldout`` plan of the same seed lies half-way between the ``calibration`` frames (phase φ + ½)
without ever meeting them.

Everything random comes from one generator that is seeded by the caller.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

SPLITS = ("calibration", "heldout")
"""Two plans of the same seed that share no frame."""


@dataclass(frozen=True)
class Span:
    """An episode as the plan sees it: what it is about, and how many frames it has."""

    stratum: Hashable
    length: int


def plan_frames(
    spans: Sequence[Span], count: int, seed: int, split: str = "calibration"
) -> list[tuple[int, int]]:
    """Choose at most ``count`` frames.

    Args:
        spans: the episodes.
        count: how many frames at most; fewer when the episodes are short.
        seed: of the draws; same seed, same plan.
        split: ``calibration``, or ``heldout`` for the frames between those.

    Returns:
        (position in ``spans``, frame in the episode), ascending and without repetition.
    """
    generator = np.random.default_rng(seed)
    quotas = _quotas(spans, count, generator)
    chosen = [i for i, quota in enumerate(quotas) if quota]
    draws = generator.permutation(len(chosen)) + generator.random(len(chosen))
    draws /= max(1, len(chosen))
    plan = {name: _frames(spans, quotas, chosen, draws + shift) for name, shift in _SHIFTS.items()}
    taken = set(plan["calibration"]) if split == "heldout" else set()
    return [frame for frame in plan[split] if frame not in taken]


_SHIFTS = {"calibration": 0.0, "heldout": 0.5}


def _frames(
    spans: Sequence[Span], quotas: Sequence[int], chosen: Sequence[int], phases: np.ndarray
) -> list[tuple[int, int]]:
    found = []
    for i, phase in zip(chosen, phases % 1.0, strict=True):
        length, quota = spans[i].length, quotas[i]
        steps = np.floor((np.arange(quota) + phase) * (length / quota)).astype(int)
        found += [(i, int(frame)) for frame in steps.clip(0, length - 1)]
    return found


def _quotas(spans: Sequence[Span], count: int, generator: np.random.Generator) -> list[int]:
    """How many frames each episode gives."""
    room = [max(span.length // 2, min(span.length, 1)) for span in spans]
    members: dict[Hashable, list[int]] = {}
    for i, span in enumerate(spans):
        members.setdefault(span.stratum, []).append(i)
    groups = list(members.values())
    shares = _share(count, [sum(room[i] for i in group) for group in groups], generator)
    quotas = [0] * len(spans)
    for group, share in zip(groups, shares, strict=True):
        parts = _share(share, [room[i] for i in group], generator)
        for i, quota in zip(group, parts, strict=True):
            quotas[i] = quota
    return quotas


def _share(count: int, room: Sequence[int], generator: np.random.Generator) -> list[int]:
    """``count`` in parts that are as even as ``room`` allows; the rest in a drawn order."""
    parts = [0] * len(room)
    unfilled = [int(i) for i in generator.permutation(len(room)) if room[i] > 0]
    while count and unfilled:
        each = max(1, count // len(unfilled))
        for i in unfilled[:count]:
            more = min(each, room[i] - parts[i])
            parts[i] += more
            count -= more
        unfilled = [i for i in unfilled if parts[i] < room[i]]
    return parts
