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
        self._solved = False

    @property
    def max_steps(self) -> int:
        """One more than the environment's: the view after the last action is wanted too."""
        return self._environment.max_steps + 1

    def reset(self, seed: int) -> Mapping[str, Any]:
        """Start the episode again."""
        self._solved = False
        return {**self._environment.reset(seed), SOLVED: False}

    def step(self, action: Any) -> bool:
        """Carry out one action; never over."""
        self._solved = bool(self._environment.step(action)) or self._solved
        return False

    def observe(self) -> Mapping[str, Any]:
        """What is seen now."""
        return {**self._environment.observe(), SOLVED: self._solved}

    def close(self) -> None:
        """Free the environment."""
        self._environment.close()
