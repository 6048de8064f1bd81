"""Real-time chunking: a new action chunk that continues what the robot is still carrying out.

While a chunk is computed the robot carries out what is left of the one before.  When the new one is
there, its first ``delay`` actions are past, and its next ones belong to another plan: the robot
jerks.  Real-time chunking (Black, Galliker and Levine, arXiv 2506.07339) treats the new chunk as an
image of which a part is known.  The left-over of the previous chunk is the known part; at every
denoising step the velocity is corrected so that the chunk comes out as the left-over where that
will be carried out anyway, and less and less like it after that:

    x₁ = x - t·v                                  the chunk the velocity v at flow time t leads to
    v ← v - g(t)·w·(previous - x₁)                t runs from 1 (noise) to 0, v = noise - actions
    g(t) = min(most, t/(1 - t) · (t² + (1 - t)²)/t²)

The paper's correction is a vector-Jacobian product through the network.  LeRobot (0.6.1,
``policies/rtc/modeling_rtc.py``) takes v as a constant there, which makes the Jacobian of x₁ the
identity: the closed form above, with no gradient.  This module is that one.

The weights w over the actions of a chunk are 1 for the first ``delay``, 0 from the end of the
horizon on, and between them as the schedule says.

Only numpy is imported here: a robot's side uses these types too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import ObservationError, PolicyError

Array = npt.NDArray[np.float32]
WeightSchedule = Literal["linear", "exp", "ones", "zeros"]
SCHEDULES: tuple[str, ...] = get_args(WeightSchedule)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class RealTimeChunking:
    """How a new chunk continues the previous one; names and defaults are LeRobot's ``RTCConfig``.

    Attributes:
        execution_horizon: actions of the new chunk that may be guided at all, from its first on.
            Never more than are left over.  Those that the delay makes past are always guided, also
            beyond this.
        max_guidance_weight: bound of g, ``most`` above.
        schedule: the weights between delay and horizon: ``linear`` falls evenly, ``exp`` faster,
            ``ones`` stays at 1, ``zeros`` guides the delay alone.
    """

    execution_horizon: int = 10
    max_guidance_weight: float = 10.0
    schedule: WeightSchedule = "linear"

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            PolicyError: names the setting.
        """
        if not _is_count(self.execution_horizon) or self.execution_horizon < 1:
            raise PolicyError(
                f"execution_horizon must be a whole number of actions, at least 1; got "
                f"{self.execution_horizon!r}"
            )
        if not 0.0 < self.max_guidance_weight < math.inf:
            raise PolicyError(
                f"max_guidance_weight must be a number above 0, got {self.max_guidance_weight!r}"
            )
        if self.schedule not in SCHEDULES:
            raise PolicyError(
                f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
            )

    def prefix_weights(self, delay: int, left: int, horizon: int) -> Array:
        """The weights w of a chunk's actions.

        Args:
            delay: actions that will be past when the chunk is there.
            left: actions of the left-over, at least ``delay``.
            horizon: actions of the chunk, at least ``left``.

        Returns:
            [horizon] float32 in [0, 1].
        """
        end = min(max(self.execution_horizon, delay), left)
        weights = np.zeros(horizon, np.float32)
        weights[:delay] = 1.0
        if self.schedule == "ones":
            weights[:end] = 1.0
        elif self.schedule in ("linear", "exp"):
            falling = np.linspace(1.0, 0.0, end - delay + 2)[1:-1]
            if self.schedule == "exp":
                falling = falling * np.expm1(falling) / (math.e - 1.0)
            weights[delay:end] = falling
        return weights


DEFAULT_CHUNKING = RealTimeChunking()


def guidance_weight(t: float) -> float:
    """g at flow time t in (0, 1] before it is bounded; infinite at t = 1."""
    if t >= 1.0:
        return math.inf
    return t / (1.0 - t) * (t * t + (1.0 - t) ** 2) / (t * t)


@dataclass(frozen=True)
class LeftOver:
    """What is left of the previous chunk while a new one is computed.

    Attributes:
        actions: [T, action_dim] float32, in the units in which the policy returned them; the first
            is the one that belongs to the moment of the new observation.
        delay: how many of them will be carried out before the new chunk is there.

    Raises:
        ObservationError: not such actions, or a delay that is not 0 … T.
    """

    actions: Array
    delay: int

    def __post_init__(self) -> None:
        """Check, and keep a float32 copy."""
        try:
            actions = np.asarray(self.actions, dtype=np.float32).copy()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ObservationError(f"previous is not numeric: {error}") from error
        if actions.ndim != 2 or 0 in actions.shape:
            raise ObservationError(
                "previous must be the unexecuted actions of the previous chunk, "
                f"[1 or more, action_dim]; got shape {list(actions.shape)} (leave it out where "
                "none are left)"
            )
        if not np.isfinite(actions).all():
            step, dimension = map(int, np.argwhere(~np.isfinite(actions))[0])
            raise ObservationError(
                f"previous has NaN or Inf at action {step}, dimension {dimension}"
            )
        if not _is_count(self.delay) or self.delay < 0:
            raise ObservationError(
                f"delay must be a whole number of control steps, 0 or more; got {self.delay!r}"
            )
        if self.delay > len(actions):
            raise ObservationError(
                f"delay={self.delay} control steps, but previous has only {len(actions)} actions: "
                "the robot runs out of them before the new chunk is there. Ask earlier, or give "
                "at most as many steps as there are actions"
            )
        object.__setattr__(self, "actions", actions)
        object.__setattr__(self, "delay", int(self.delay))


def left_over_of(previous: Any, delay: int | None) -> LeftOver | None:
    """The left-over that two optional arguments mean; None where both are absent.

    Raises:
        ObservationError: one without the other, or see ``LeftOver``.
    """
    if previous is None and delay is None:
        return None
    if previous is None:
        raise ObservationError(
            f"delay={delay!r} without previous: give the unexecuted actions of the previous chunk "
            "too, or neither where there is no previous chunk"
        )
    if delay is None:
        raise ObservationError(
            "previous without delay: say how many of these actions will be carried out before the "
            "new chunk is there (0 or more control steps)"
        )
    return LeftOver(previous, delay)
