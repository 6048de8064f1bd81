"""``OmegaQvlaPolicy``: an artifact as a policy of LeRobot's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

import omega_qvla as oq
from lerobot_policy_omega_qvla.configuration_omega_qvla import OmegaQvlaConfig
from lerobot_policy_omega_qvla.runners import Runner, make_runner, require_device
from omega_qvla.artifact import read_description
from omega_qvla.errors import ArtifactError, PolicyError

_FOR_TRAINING = "a quantized policy is not trained: train the one it was made of, and quantize that"


class OmegaQvlaPolicy(PreTrainedPolicy):
    """A policy that multiplies integers, in the place of the one it was made of.

    It takes observations as environments give them, after renaming, and gives actions in the
    robot's units: normalizing and tokenizing are the artifact's own.
    """

    config_class = OmegaQvlaConfig
    name = "omega_qvla"

    def __init__(self, config: OmegaQvlaConfig, quantized: oq.QuantizedPolicy, **_: Any) -> None:
        super().__init__(config)
        self.config: OmegaQvlaConfig = config
        # Not a submodule: LeRobot would move it, and count or train its parameters.
        vars(self)["quantized"] = quantized
        self._runner: Runner = make_runner(quantized, config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        **_: Any,
    ) -> OmegaQvlaPolicy:
        """Load an artifact; every byte is checked against its hash.

        Raises:
            PolicyError: it is not a directory here.
            ArtifactError, ResourceError: it is damaged, or cannot be run on this machine.
        """
        directory = Path(pretrained_name_or_path)
        if not directory.is_dir():
            raise PolicyError(
                f"no artifact at {str(directory)!r}: fetch it first, at a fixed revision (hf "
                "download OWNER/NAME --revision COMMIT --local-dir DIR), and give DIR"
            )
        given = config or PreTrainedConfig.from_pretrained(directory)
        if not isinstance(given, OmegaQvlaConfig):
            raise ArtifactError(f"{directory / 'config.json'} is not of the type omega_qvla")
        device = str(given.device)
        require_device(device, str(read_description(directory).config["policy"]["family"]))
        on_cpu = {"kernel": given.kernel, "threads": given.threads} if device == "cpu" else {}
        quantized = oq.load(directory, device=device, **on_cpu)
        return cls(given, quantized).eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(str(self.config.device))

    def reset(self) -> None:
        """An episode begins: what was queued is forgotten."""
        self._runner.reset()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Tensor],
        noise: Tensor | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
    ) -> Tensor:
        """[B, T, A] float32 in the robot's units.

        Args:
            batch: observations as the pipeline of the artifact gives them.
            noise: what to start from, [B, T, A'], where the policy takes it; drawn when absent.
            inference_delay, prev_chunk_left_over: of real-time chunking, [T, A] or [B, T, A] as
                this method returned them (``policies/lerobot_chunking.py``).

        Raises:
            PolicyError: there is a left-over, and LeRobot's own code runs the policy.
        """
        left_over = prev_chunk_left_over
        return self._runner.chunk(batch, noise, inference_delay, left_over)

    def supports_rtc(self) -> bool:
        """Whether a chunk can continue another one, in LeRobot's real-time chunking."""
        return self._runner.continues

    @torch.no_grad()
    def select_action(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
        """The next action of every observation, [B, A] in the robot's units."""
        return self._runner.action(batch)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        raise NotImplementedError(_FOR_TRAINING)

    def get_optim_params(self) -> dict[str, Any]:
        raise NotImplementedError(_FOR_TRAINING)
