"""An episode carried out again from its actions, with a view after every one of them.

An evaluation sees the world only where the policy is asked, in the policy's own small images, and
not after the last action.  Episodes are functions of their seed and their actions, so pictures need
no second policy run: the same seed and the same actions, in an environment that never calls the
episode over and may render larger.  It runs in a simulator process like any other and knows no
torch (``worker.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omega_qvla.environments import IS_SUCCESS
from omega_qvla.evaluation.simulators.simulator_process import import_factory

REPLAY = "omega_qvla.evaluation.simulators.replay:Replay"
SOLVED = "solved"


class Replay:
    """Wraps an environment; observations say under ``solved`` whether it has been solved so far.

    Args:
        task: name of the task.
        environment: the wrapped factory as ``module:callable``.
        options: its keyword arguments.
    """

    def __init__(self, task: str, environment: str, options: Mapping[str, Any]) -> None:
        self._environment = import_factory(environment)(task, **options)
        self.action_space = self._environment.action_space
        self._solved = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Start the episode again."""
        observation, info = self._environment.reset(seed=seed, options=options)
        self._solved = False
        return {**observation, SOLVED: False}, info

    def step(self, action: Any) -> tuple[Mapping[str, Any], float, bool, bool, dict[str, Any]]:
        """Carry out one action; never over."""
        observation, _, _, _, info = self._environment.step(action)
        self._solved = bool(info.get(IS_SUCCESS)) or self._solved
        return {**observation, SOLVED: self._solved}, 0.0, False, False, info

    def close(self) -> None:
        """Free the environment."""
        self._environment.close()
