from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

ENVIRONMENT = "fake_environment:FakeEnvironment"


class PointPolicy:
    """Moves towards the target its observation shows, with a little sampling noise."""

    noise_shape = (8, 3)

    def __init__(self, gain=1.0, spread=0.25):
        self.gain, self.spread, self.noises = gain, spread, []

    def sample_actions(self, observation, noise=None):
        self.noises.append(np.array(noise))
        remaining = np.asarray(observation["state"])
        chunk = np.zeros(self.noise_shape, dtype=np.float32)
        for row, draw in zip(chunk, noise, strict=True):
            row[:] = self.gain * remaining / 0.3 + self.spread * draw
            remaining = remaining - 0.3 * np.clip(row, -1, 1)
        return chunk


@pytest.fixture(autouse=True)
def _fake_environment_importable(monkeypatch):
    """Simulator processes inherit this process's import path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def point_policy():
    return PointPolicy


@pytest.fixture
def environment():
    return ENVIRONMENT
