"""Published policies calibrated on LeRobot datasets, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_formats import (
    robot_observation,
    train_sentencepiece,
    write_groot,
    write_lerobot_pi05,
)

import omega_qvla as oq
from omega_qvla.cli import main
from omega_qvla.policies.gr00t_n15.checkpoints import sizes as gr00t_sizes
from omega_qvla.policies.layers import siglip_checkpoints

pytestmark = pytest.mark.long

# Within the statistics of these policies.
STATES = {(e, f): [f / 30 - e / 4, e / 2 - f / 20, 1 + e / 2] for e in range(3) for f in range(30)}
CAMERAS = ("observation.images.front", "observation.images.wrist")


@pytest.fixture(autouse=True)
def _heads_of_small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their shapes do not tell them, and they were never published."""
    monkeypatch.setitem(siglip_checkpoints.VISION_HEADS, (64, 72), 2)
    monkeypatch.setitem(gr00t_sizes.FEATURE_HEADS, 64, 2)
    monkeypatch.setitem(gr00t_sizes.HEAD_HEADS, 32, 4)


def quantize(policy: Path, dataset: Path, out: Path) -> int:
    """Exit status, with no option but the two that name data and destination."""
    with pytest.raises(SystemExit) as stop:
        main(["quantize", str(policy), "--calibration", str(dataset), "--out", str(out)])
    return stop.value.code if isinstance(stop.value.code, int) else 1


def test_lerobots_pi05_needs_no_option_but_out(
    write_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece", reason="the extra hub is not installed")
    dataset = write_dataset("v2.1", cameras=CAMERAS, state_width=3, states=STATES).root
    policy = write_lerobot_pi05(tmp_path / "policy", train_sentencepiece())
    assert quantize(policy, dataset, tmp_path / "out") == 0
    chunk = oq.load(tmp_path / "out").sample_actions(robot_observation(("front", "wrist")))
    assert chunk.shape == (4, 3) and np.isfinite(chunk).all()


def test_lerobots_groot_needs_no_option_but_out(
    write_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers", reason="the extra hub is not installed")
    dataset = write_dataset("v3.0", cameras=CAMERAS, state_width=3, states=STATES).root
    policy = write_groot(tmp_path / "policy")
    assert quantize(policy, dataset, tmp_path / "out") == 0
    chunk = oq.load(tmp_path / "out").sample_actions(robot_observation(("front", "wrist")))
    assert chunk.shape == (16, 3) and np.isfinite(chunk).all()
