"""Our real-time chunking beside LeRobot's: one denoising step, the left-over, whole chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from guided_cases import STEP_SHAPE, STEP_TIMES, Setting, previous, step_tensors
from lerobot_cases import FLAT_DIMENSION, HORIZON, Case, noise, observations
from lerobot_parity import Record, choices_of

from omega_qvla.policies.full_precision import load_policy
from omega_qvla.policies.guidance import Guidance, together
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.observations import Encoded
from omega_qvla.real_time_chunking import LeftOver, RealTimeChunking

TOLERANCE = 1e-6
"""Of numbers of about 1 to 5; seen are 7.2e-7 of whole chunks and 1.8e-7 of one step."""
FILE = Path(__file__).parents[1] / "parity" / "golden" / "lerobot_guided.safetensors"


def chunking(setting: Setting) -> RealTimeChunking:
    """Ours."""
    schedule: Any = setting.schedule
    return RealTimeChunking(setting.execution_horizon, setting.max_guidance_weight, schedule)


def guidance(normalized: np.ndarray, setting: Setting, shape: tuple[int, int, int]) -> Guidance:
    """What a batch of left-overs [B, left, width], normalized already, guides to."""
    rows = [
        Guidance.to(LeftOver(one, setting.delay), chunking(setting), shape[1:])
        for one in normalized
    ]
    found = together(rows)
    assert found is not None
    return found


def step_difference(record: Record, setting: Setting) -> float:
    """Largest difference of a guided velocity, relative to the largest velocity."""
    given = {key: torch.from_numpy(value) for key, value in step_tensors(setting).items()}
    guiding = guidance(given["previous"].numpy(), setting, STEP_SHAPE)
    ours = [given["v"] - guiding.correction(given["x"] - t * given["v"], t) for t in STEP_TIMES]
    theirs = record[f"step/{setting.name}"]
    return float(np.abs(torch.stack(ours).numpy() - theirs).max() / np.abs(theirs).max())


def left_over_difference(policy: NativePolicy, record: Record, case: Case) -> float:
    """Largest difference of a left-over in the network's units, dimensions without spread aside."""
    worst = 0.0
    for seen, actions, theirs in zip(
        observations(case), previous(HORIZON), record[f"{case.name}/normalized"], strict=True
    ):
        row = policy.encode(seen, LeftOver(actions, 0)).guidance
        assert row is not None
        assert not row.weights[0, :, FLAT_DIMENSION].any(), "it cannot be brought back"
        ours = np.delete(row.previous[0, :, : actions.shape[1]].numpy(), FLAT_DIMENSION, axis=1)
        theirs = np.delete(theirs, FLAT_DIMENSION, axis=1)
        worst = max(worst, float(np.abs(ours - theirs).max()))
    return worst


def chunk_difference(policy: NativePolicy, record: Record, case: Case, setting: Setting) -> float:
    """Largest difference of normalized chunks that continue the same normalized left-over."""
    given = record[f"{case.name}/normalized"][:, : setting.left]
    theirs = record[f"{case.name}/{setting.name}"]
    worst = 0.0
    for i, seen in enumerate(observations(case)):
        guiding = guidance(given[i : i + 1], setting, (1, *policy.noise_shape))
        plain = policy.encode(seen)
        encoded = Encoded(plain.inputs, plain.anchor, guiding)
        (actions,) = policy.sample_batch([encoded], [noise()[i]])
        expected = policy.processor.decode(torch.from_numpy(theirs[i]), plain.anchor)
        worst = max(worst, float(np.abs(actions - expected).max()))
    return worst


def loaded(checkpoint: Path, case: Case) -> NativePolicy:
    """The case's policy with ours."""
    return load_policy(checkpoint, choices_of(case))
