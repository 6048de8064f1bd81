"""Actions of overlapping chunks, tick by tick: pure bookkeeping on the robot's side.

A robot acts at a fixed rate; call its periods ticks.  A chunk that was asked for with the
observation of tick k holds the actions of ticks k, k+1, …, k+H-1.  It arrives later, at tick
n > k, while the robot carries out what an earlier chunk planned.  Its first n-k actions are then
past and are dropped; from tick n on it takes over gradually,

    action(n + i) = (1 - w_i)·planned + w_i·new,      w_i = min(1, (i + 1)/(b + 1)),

so that b ticks blend the two and none jumps from one plan to the other (after the temporal
ensembling of ACT, arXiv 2304.13705, whose weights never let an old plan go).  Dimensions that mean
a decision rather than a quantity (a gripper) can be told to switch at once.

When no action is planned for a tick the robot is late, and what it does then is decided
beforehand: ``hold`` an action that is safe to repeat, or ``stop``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import PolicyError, ServingError
from omega_qvla.real_time_chunking import LeftOver

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Blending:
    """How chunks follow each other.

    Attributes:
        ticks: b above; 0 switches at once.
        switched: dimensions that always switch at once.
        late: what happens on a tick without a planned action.
        hold_action: what ``hold`` does: for robots commanded by *differences* or velocities an
            action that does nothing, such as zeros; None repeats the last action, which is only
            right for absolute positions.
        change: how far each dimension may move from one executed action to the next, or None; the
            action is brought that far and no further, and counted.
        continued: whether a request brings what is planned and the delay to be expected, so that
            the new chunk continues it (real-time chunking); the server must be one of this project.
    """

    ticks: int = 2
    switched: tuple[int, ...] = ()
    late: Literal["hold", "stop"] = "stop"
    hold_action: tuple[float, ...] | None = None
    change: tuple[float, ...] | None = None
    continued: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            PolicyError: negative ticks or changes.
        """
        if self.ticks < 0 or any(not value >= 0 for value in self.change or ()):
            raise PolicyError("blending needs ticks ≥ 0 and changes ≥ 0")


DEFAULT_BLENDING = Blending()
_REMEMBERED = 10
"""Chunks whose delays are looked at."""
_SPARE = 2
"""Ticks that a chunk may be later than expected before the robot runs out of actions."""


class ActionQueue:
    """What a robot does at each tick.

    Attributes:
        late: ticks without a planned action so far.
        slowed: executed actions that were brought closer to the one before.
        delays: of the chunks so far, ticks from observation to arrival.
    """

    def __init__(self, blending: Blending = DEFAULT_BLENDING) -> None:
        self._blending = blending
        self._planned: dict[int, Array] = {}
        self._observed: dict[int, int] = {}
        self._last: Array | None = None
        self.late = 0
        self.slowed = 0
        self.delays: list[int] = []

    def left(self, tick: int) -> int:
        """How many ticks from this one on have a planned action."""
        return sum(1 for planned in self._planned if planned >= tick)

    @property
    def expected_delay(self) -> int:
        """Ticks that the next chunk is expected to take: the most that the last ones took."""
        return max(self.delays[-_REMEMBERED:], default=0)

    def due(self, tick: int, ask_below: int) -> bool:
        """Whether it is time to ask: few actions are left, or as many as the answer takes."""
        enough = self.expected_delay + _SPARE if self._blending.continued else 0
        return self.left(tick) < max(ask_below, enough)

    def to_continue(self, tick: int) -> LeftOver | None:
        """What a chunk that is asked for at this tick continues; None where nothing is planned."""
        planned = self.left_over(tick) if self._blending.continued else None
        if planned is None:
            return None
        return LeftOver(planned, min(self.expected_delay, len(planned)))

    def left_over(self, tick: int) -> Array | None:
        """The planned actions from this tick on, [T, A], up to the first tick without one.

        They are what the robot will carry out, blended or not; None where none is planned.
        """
        ticks = itertools.takewhile(self._planned.__contains__, itertools.count(tick))
        actions = [self._planned[planned] for planned in ticks]
        return np.stack(actions) if actions else None

    def merge(self, chunk: npt.NDArray[Any], observed: int, tick: int) -> int:
        """A chunk arrived.

        Args:
            chunk: [H, A], in the robot's units.
            observed: the tick of its observation.
            tick: the next tick to be executed.

        Returns:
            How many of its actions were past already.

        Raises:
            PolicyError: it is not a chunk of finite actions like those before.
        """
        actions = np.asarray(chunk, np.float32)
        if actions.ndim != 2 or not np.isfinite(actions).all():
            raise PolicyError(f"expected finite actions [H, A], got shape {list(actions.shape)}")
        newest = max(self._observed.values(), default=observed)
        if observed < newest:
            return len(actions)  # overtaken by a chunk of a newer observation
        self.delays.append(max(tick - observed, 0))
        past = min(self.delays[-1], len(actions))
        fresh: dict[int, Array] = {}
        for i, action in enumerate(actions[past:]):
            fresh[tick + i] = self._blended(tick + i, action, i)
        self._planned = fresh
        self._observed = dict.fromkeys(fresh, observed)
        return past

    def next(self, tick: int) -> tuple[Array, int | None]:
        """The action of a tick, and the tick of the observation it comes from (None when late).

        Raises:
            ServingError: ``late``, where that was chosen, or there is nothing to hold yet.
        """
        action = self._planned.pop(tick, None)
        observed = self._observed.get(tick)
        if action is None:
            return self._hold(tick), None
        self._last = self._within_change(action)
        return self._last, observed

    def _blended(self, tick: int, action: Array, i: int) -> Array:
        planned = self._planned.get(tick)
        if planned is None:
            return action
        if planned.shape != action.shape:
            raise PolicyError(f"actions of {len(action)} numbers after actions of {len(planned)}")
        weight = min(1.0, (i + 1) / (self._blending.ticks + 1))
        blended = ((1.0 - weight) * planned + weight * action).astype(np.float32)
        switched = list(self._blending.switched)
        blended[switched] = action[switched]
        return blended

    def _hold(self, tick: int) -> Array:
        self.late += 1
        given = self._blending.hold_action
        held = self._last if given is None else np.asarray(given, np.float32)
        if self._blending.late == "stop" or held is None:
            raise ServingError("late", f"no action is planned for tick {tick}: the robot stops")
        self._last = held
        return held

    def _within_change(self, action: Array) -> Array:
        if self._blending.change is None or self._last is None:
            return action
        change = np.asarray(self._blending.change, np.float32)
        slower = self._last + np.clip(action - self._last, -change, change)
        self.slowed += bool((slower != action).any())
        return slower.astype(np.float32)
