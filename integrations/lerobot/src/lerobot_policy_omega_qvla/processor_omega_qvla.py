"""Pipelines for LeRobot: names, batches and devices; everything else is the policy's own.

An artifact has the processors it was calibrated with, and runs them itself: it takes what a robot
or an environment sees, and gives actions in the robot's units.
"""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    policy_action_to_transition,
    transition_to_policy_action,
)

from lerobot_policy_omega_qvla.configuration_omega_qvla import OmegaQvlaConfig


def make_omega_qvla_pre_post_processors(
    config: OmegaQvlaConfig, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """The pipelines that an artifact's JSON files describe."""
    del dataset_stats  # the policy has its own
    device = config.device or "cpu"
    before = PolicyProcessorPipeline(
        steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=device),
        ],
        name="policy_preprocessor",
    )
    after = PolicyProcessorPipeline(
        steps=[DeviceProcessorStep(device="cpu")],
        name="policy_postprocessor",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
