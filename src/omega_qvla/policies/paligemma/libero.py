"""How openpi evaluates its policies in LIBERO (``examples/libero/main.py``)."""

from __future__ import annotations

from omega_qvla.policies.family import LiberoConvention

LIBERO = LiberoConvention(
    execute=5,
    max_steps={"spatial": 220, "object": 280, "goal": 300, "long": 520},
    gripper="signed",
    seed=7,
)
