"""The flow from noise to a normalized chunk: Euler steps, guided where one is continued."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.guidance import Guidance


def integrate(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    steps: int,
    clock: FlowClock,
    guidance: Guidance | None = None,
) -> Tensor:
    """Integrate the flow from noise to a normalized action chunk.

    Args:
        velocity: x [B, horizon, action_dim] and the number of the step → noise - actions.
        noise: [B, horizon, action_dim] at t = 1.
        steps: Euler steps.
        clock: entered once per step.
        guidance: what the chunk continues, or None.
    """
    x = noise
    for i, t in enumerate(euler_times(steps)):
        with clock.step(i, t):
            v = velocity(x, i)
        if guidance is not None:
            v = v - guidance.correction(x - t * v, t)
        x = x - v / steps
    return x
