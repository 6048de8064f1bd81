"""LeRobot's call shape of real-time chunking, without LeRobot."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.lerobot_chunking import continued_by_lerobot
from omega_qvla.policies.native import NativePolicy
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking


class Schedule(str, Enum):
    """As LeRobot's ``RTCAttentionSchedule``."""

    LINEAR = "LINEAR"
    EXP = "EXP"


def config(**changes: Any) -> Any:
    values = {
        "enabled": True,
        "prefix_attention_schedule": Schedule.LINEAR,
        "max_guidance_weight": 10.0,
        "execution_horizon": 10,
    }
    return SimpleNamespace(**{**values, **changes})


LEFT = torch.arange(1.0, 9.0).reshape(4, 2)


def test_one_left_over_is_for_every_observation_of_the_batch_and_several_are_each_its_own() -> None:
    both, chunking = continued_by_lerobot(2, config(), 1, LEFT)
    assert chunking == RealTimeChunking()
    assert [(one.delay, one.actions.tolist()) for one in both if one] == [(1, LEFT.tolist())] * 2
    own, _ = continued_by_lerobot(2, config(), 1, torch.stack((LEFT, -LEFT)))
    assert own[1] is not None and np.array_equal(own[1].actions, -LEFT.numpy())


def test_settings_are_lerobots() -> None:
    given = config(prefix_attention_schedule=Schedule.EXP, execution_horizon=3)
    (left,), chunking = continued_by_lerobot(1, given, 7, LEFT)
    assert chunking == RealTimeChunking(3, 10.0, "exp")
    assert left is not None and left.delay == 3, "LeRobot guides no further than the horizon"
    with pytest.raises(PolicyError, match="schedule"):
        continued_by_lerobot(1, config(prefix_attention_schedule="COSINE"), 0, LEFT)


@pytest.mark.parametrize(
    ("settings", "left"),
    [(None, LEFT), (config(enabled=False), LEFT), (config(), None), (config(), 0 * LEFT)],
)
def test_nothing_is_continued_where_lerobot_continues_nothing(settings: Any, left: Any) -> None:
    found, _ = continued_by_lerobot(2, settings, 1, left)
    assert found == [None, None]
    assert continued_by_lerobot(1, None, None, None) == ([None], DEFAULT_CHUNKING)


def test_the_zeros_that_lerobot_fills_up_with_are_no_actions() -> None:
    filled = torch.cat((LEFT, torch.zeros(6, 2)))
    (left,), _ = continued_by_lerobot(1, config(), 6, filled)
    assert left is not None and left.delay == 4 and np.array_equal(left.actions, LEFT.numpy())


def test_a_left_over_of_another_batch_is_refused() -> None:
    with pytest.raises(ObservationError, match=r"\[3, T, A\], got \[2, 4, 2\]"):
        continued_by_lerobot(3, config(), 1, torch.stack((LEFT, LEFT)))


def test_a_plug_in_samples_what_the_policy_samples(
    small_gr00t: NativePolicy, few: Observations
) -> None:
    noise = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    before = torch.from_numpy(small_gr00t.sample_actions(few[0], -noise))
    left_overs, chunking = continued_by_lerobot(1, config(), 2, before[1:])
    (chunk,) = small_gr00t.sample_batch(
        [small_gr00t.encode(few[1], left_overs[0], chunking)], [noise]
    )
    alone = small_gr00t.sample_actions(few[1], noise, previous=before[1:], delay=2)
    assert np.array_equal(chunk, alone)
