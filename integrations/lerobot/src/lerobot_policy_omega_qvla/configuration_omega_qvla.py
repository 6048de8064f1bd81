"""The configuration of an artifact inside LeRobot: its features, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig


@PreTrainedConfig.register_subclass("omega_qvla")
@dataclass
class OmegaQvlaConfig(PreTrainedConfig):
    """What ``config.json`` of an artifact holds for LeRobot, and ``--policy.NAME=`` changes.

    Attributes:
        n_action_steps: actions carried out of each chunk; None: as many as the policy was saved
            with, or the whole chunk.
        noise_seed: of a native policy: chunk k of episode i starts from the noise of
            ``omega-qvla eval`` for seed ``noise_seed + i``.  None: drawn by PyTorch's own
            generator, which ``lerobot-eval --seed`` sets.
        threads: of the integer kernels; None: PyTorch's.
        kernel: integer kernel; None: the best of this machine.
        rtc_config: set by LeRobot where it runs a policy in real-time chunks.
    """

    n_action_steps: int | None = None
    noise_seed: int | None = None
    threads: int | None = None
    kernel: str | None = None
    rtc_config: RTCConfig | None = None

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def validate_features(self) -> None:
        """Nothing: an artifact's features are its own."""

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError("a quantized policy is not trained: train the one it was made of")

    def get_scheduler_preset(self) -> None:
        return None
