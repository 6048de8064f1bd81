"""Blueprints of the point policy, for worker processes.

``dies_building`` is a file whose existence makes the process kill itself while it builds the
policy, once; ``dies_at`` a file whose existence makes it do so at its fifth chunk in a simulator.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from omega_qvla.errors import PolicyError
from omega_qvla.evaluation.execution.blueprint import Blueprint, Built, Footprint


class PointPolicy:
    """Moves towards the target its observation shows, with a little sampling noise."""

    noise_shape = (8, 3)

    def __init__(self, gain=1.0, spread=0.25, dies_at=None):
        self.gain, self.spread, self.driven = gain, spread, 0
        self._dies_at = None if dies_at is None else Path(dies_at)

    def sample_actions(self, observation, noise=None):
        self.driven += "images" in observation
        if self._dies_at is not None and self.driven == 5:
            die_once(self._dies_at)
        remaining = np.asarray(observation["state"])
        chunk = np.zeros(self.noise_shape, dtype=np.float32)
        for row, draw in zip(chunk, noise, strict=True):
            row[:] = self.gain * remaining / 0.3 + self.spread * draw
            remaining = remaining - 0.3 * np.clip(row, -1, 1)
        return chunk


def die_once(note):
    try:
        note.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def build(report, gain=1.0, dies_building=None, dies_at=None, log=None, fail=False):
    if fail:
        raise PolicyError("no such policy")
    if dies_building is not None:
        die_once(Path(dies_building))
    report("building", 0, 1)
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()} {gain}\n")
    arguments = {"gain": gain, "dies_at": dies_at, "log": log}
    report("building", 1, 1)
    policy = PointPolicy(gain, dies_at=dies_at)
    return Built(policy, Footprint(7, int(100 * gain)), Blueprint("fake_policy:build", arguments))
