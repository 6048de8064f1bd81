"""LeRobot's real-time chunking in ours: what its rollout passes to ``predict_action_chunk``.

``lerobot-rollout --inference.type=rtc`` sets ``policy.config.rtc_config`` and calls
``predict_action_chunk(batch, inference_delay=…, prev_chunk_left_over=…)``.  A policy that answers
in the robot's units (its postprocessor leaves actions as they are) gets its left-over back in them:

    left_overs, chunking = continued_by_lerobot(
        len(observations), self.config.rtc_config, inference_delay, prev_chunk_left_over
    )
    pairs = zip(observations, left_overs)
    encoded = [native.encode(observation, left_over, chunking) for observation, left_over in pairs]
    chunks = native.sample_batch(encoded, noises)

Source: LeRobot 0.6.1 (``rollout/inference/rtc.py``, ``policies/rtc/modeling_rtc.py``).  Nothing of
LeRobot is imported here.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from omega_qvla.errors import ObservationError
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, LeftOver, RealTimeChunking


class RTCConfig(Protocol):
    """As much of LeRobot's ``RTCConfig`` as is used."""

    enabled: bool
    prefix_attention_schedule: Any
    max_guidance_weight: float
    execution_horizon: int


def continued_by_lerobot(
    batch: int,
    config: RTCConfig | None,
    inference_delay: int | None,
    prev_chunk_left_over: torch.Tensor | None,
) -> tuple[list[LeftOver | None], RealTimeChunking]:
    """What each observation of a batch continues, and how.

    Two things LeRobot does silently are done here as well: without ``rtc_config``, or with one that
    is not enabled, nothing is continued; and a delay beyond the horizon or the left-over counts as
    that.  One is undone: its rollout fills a short left-over with zeros up to the horizon, which in
    the robot's units are positions.  Rows of nothing but zeros at the end are left out.

    Args:
        batch: observations.
        config: what LeRobot put into ``policy.config.rtc_config``, or None.
        inference_delay: control steps, or None.
        prev_chunk_left_over: [T, A], or [batch, T, A], as the policy returned it; or None.

    Raises:
        ObservationError: a left-over of another shape.
        PolicyError: settings that cannot be.
    """
    if config is None or not config.enabled:
        return [None] * batch, DEFAULT_CHUNKING
    schedule: Any = config.prefix_attention_schedule
    chunking = RealTimeChunking(
        config.execution_horizon,
        float(config.max_guidance_weight),
        str(getattr(schedule, "value", schedule)).lower(),  # type: ignore[arg-type]
    )
    if prev_chunk_left_over is None:
        return [None] * batch, chunking
    given = prev_chunk_left_over.detach().to("cpu", torch.float32).numpy()
    rows = np.broadcast_to(given, (batch, *given.shape)) if given.ndim == 2 else given
    if rows.ndim != 3 or len(rows) != batch:
        raise ObservationError(
            f"prev_chunk_left_over must be [T, A] or [{batch}, T, A], got {list(given.shape)}"
        )
    return [_left_over(row, inference_delay or 0, chunking) for row in rows], chunking


def _left_over(row: np.ndarray, delay: int, chunking: RealTimeChunking) -> LeftOver | None:
    filled = np.flatnonzero(row.any(axis=1))
    if not len(filled):
        return None
    actions = row[: filled[-1] + 1]
    return LeftOver(actions, min(delay, chunking.execution_horizon, len(actions)))
