"""How policies of a family are evaluated on LIBERO; ``libero.py`` has the table and its sources.

Policies are known here and not to the simulator, whose interpreter has no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.simulators.libero_suites import ACTION_DIM, STATE_DIM, VIEWS
from omega_qvla.policies.families import families
from omega_qvla.policies.family import LiberoConvention


def convention_of(family: str) -> LiberoConvention:
    """How the authors of a policy family evaluate it.

    Raises:
        PolicyError: nothing is published.
    """
    known = {name: found.libero for name, found in families().items() if found.libero}
    if family not in known:
        raise PolicyError(
            f"no LIBERO convention is known for policies of family {family!r}; known: "
            f"{', '.join(known)}"
        )
    return known[family]


def environment_options(
    family: str, cameras: Sequence[str], state_dim: int, action_dim: int
) -> dict[str, Any]:
    """Keyword arguments of ``libero.LiberoEnv`` for a policy, as JSON values.

    Args:
        cameras: the policy's names for the fixed and the wrist view.
        state_dim, action_dim: numbers of its state and its actions.

    Raises:
        PolicyError: the policy was not made for LIBERO's robot.
    """
    if (len(cameras), state_dim, action_dim) != (len(VIEWS), STATE_DIM, ACTION_DIM):
        raise PolicyError(
            f"LIBERO gives {len(VIEWS)} views and {STATE_DIM} state numbers and takes {ACTION_DIM} "
            f"action numbers; the policy has {len(cameras)} ({', '.join(cameras)}), {state_dim} "
            f"and {action_dim}"
        )
    convention = convention_of(family)
    return {
        "cameras": list(cameras),
        "gripper": convention.gripper,
        "simulator_seed": convention.seed,
        "max_steps": dict(convention.max_steps),
    }
