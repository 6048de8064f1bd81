"""A tiny deterministic simulator: a point moves by its actions and must reach a target.

``deaths`` is a folder; a file ``<task>-<seed>-<step>`` in it makes the process kill itself at that
step, once (the file is removed first).  ``starts`` is a file that gets one line per reset.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np


class FakeEnvironment:
    max_steps = 13
    action_space = SimpleNamespace(low=-np.ones(3, np.float32), high=np.ones(3, np.float32))

    def __init__(self, task, deaths=None, starts=None, fail=None, sleep_s=0.0):
        if fail == "construct":
            raise OSError("no scene")
        self.task, self._fail, self._sleep_s = task, fail, sleep_s
        self._deaths = None if deaths is None else Path(deaths)
        self._starts = None if starts is None else Path(starts)

    def reset(self, *, seed=None, options=None):
        self._seed, self._step = seed, 0
        self._position = np.zeros(3)
        self._target = np.random.default_rng(seed).uniform(0.5, 4.5, size=3)
        if self._starts is not None:
            with self._starts.open("a") as file:
                file.write(f"{self.task} {seed} {os.getpid()}\n")
        return self.observe(), {}

    def step(self, action):
        self._step += 1
        self._maybe_die()
        if self._fail == "step":
            raise ZeroDivisionError("physics")
        time.sleep(self._sleep_s)
        assert np.abs(action).max() <= 1.0
        self._position = self._position + np.asarray(action, dtype=np.float64) * 0.3
        solved = bool(np.abs(self._target - self._position).max() < 0.12)
        over = self._step >= self.max_steps
        return self.observe(), 0.0, solved, over, {"is_success": solved}

    def observe(self):
        return {
            "images": {"base": np.full((4, 4, 3), self._seed % 256, dtype=np.uint8)},
            "state": (self._target - self._position).astype(np.float32),
            "prompt": f"do {self.task}",
        }

    def close(self):
        pass

    def _maybe_die(self):
        if self._deaths is None:
            return
        note = self._deaths / f"{self.task}-{self._seed}-{self._step}"
        if note.exists():
            note.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class TurningEnvironment(FakeEnvironment):
    """Becomes another task, and says in its state how often it has; ``broken`` cannot be had."""

    def __init__(self, task, **options):
        super().__init__(task, **options)
        self._turns = 0

    def turn_to(self, task):
        if task == "broken":
            raise OSError("no scene")
        self.task, self._turns = task, self._turns + 1

    def observe(self):
        return {**super().observe(), "state": np.array([self._turns, os.getpid()], np.float64)}


class StatelessEnvironment(FakeEnvironment):
    def observe(self):
        return {**super().observe(), "state": np.zeros(2, dtype=np.float32)}


def without_torch(task):
    assert "torch" not in sys.modules
    return FakeEnvironment(task)


def with_public_api(task):
    import omega_qvla

    assert issubclass(omega_qvla.OmegaError, Exception)
    return FakeEnvironment(task)


def libero_without_torch(task, **options):
    """LIBERO's interpreter has no torch."""
    from omega_qvla.evaluation.simulators.libero import LiberoEnv

    assert "torch" not in sys.modules
    return LiberoEnv(task, **options)
