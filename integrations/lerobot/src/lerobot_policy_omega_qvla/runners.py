"""What computes inside ``OmegaQvlaPolicy``: an engine of omega-qvla, or LeRobot's own module."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import omega_qvla as oq
from lerobot_policy_omega_qvla.configuration_omega_qvla import OmegaQvlaConfig
from omega_qvla.errors import ObservationError, PolicyError, ResourceError
from omega_qvla.policies.lerobot_bridge.policy import IMAGE, STATE, LeRobotPolicy
from omega_qvla.policies.lerobot_chunking import continued_by_lerobot
from omega_qvla.policies.native import NativePolicy

Batch = Mapping[str, Any]


class Runner(Protocol):
    """A policy in batches of LeRobot: observations as environments give them, robot's units."""

    continues: bool
    """Whether a chunk can continue the one before."""

    def reset(self) -> None:
        """An episode begins."""

    def chunk(
        self,
        batch: Batch,
        noise: Tensor | None,
        delay: int | None = None,
        left_over: Tensor | None = None,
    ) -> Tensor:
        """[B, T, A]; ``delay`` and ``left_over`` as LeRobot's rollout passes them."""
        ...

    def action(self, batch: Batch) -> Tensor:
        """The next action, [B, A]."""
        ...


def make_runner(quantized: oq.QuantizedPolicy, config: OmegaQvlaConfig) -> Runner:
    """The runner of an artifact.

    Raises:
        PolicyError: an option that is for the other kind of policy.
    """
    policy = quantized.policy
    if isinstance(policy, NativePolicy):
        return NativeRunner(policy, config)
    if not isinstance(policy, LeRobotPolicy):
        raise PolicyError("the artifact is of a module of your own, which LeRobot does not run")
    return LeRobotRunner(policy, config)


class NativeRunner:
    """A policy with an engine of omega-qvla: pi0.5, pi0, GR00T N1.5."""

    continues = True

    def __init__(self, policy: NativePolicy, config: OmegaQvlaConfig) -> None:
        self._policy, self._config = policy, config
        self._episodes, self._chunks, self._batch = 0, 0, 0
        self._started = False
        self._queue: deque[Tensor] = deque()

    def reset(self) -> None:
        if self._started:
            self._episodes += self._batch
        self._started, self._chunks = False, 0
        self._queue.clear()

    def chunk(
        self,
        batch: Batch,
        noise: Tensor | None,
        delay: int | None = None,
        left_over: Tensor | None = None,
    ) -> Tensor:
        policy = self._policy
        observations = _observations(batch, tuple(policy.config.cameras))
        self._batch, self._started = len(observations), True
        noises = self._noises(len(observations)) if noise is None else [*noise.cpu().numpy()]
        self._chunks += 1
        left_overs, chunking = continued_by_lerobot(
            len(observations), self._config.rtc_config, delay, left_over
        )
        pairs = zip(observations, left_overs, strict=True)
        encoded = [policy.encode(observation, left, chunking) for observation, left in pairs]
        return torch.from_numpy(np.stack(policy.sample_batch(encoded, noises)))

    def action(self, batch: Batch) -> Tensor:
        if not self._queue:
            steps = self._config.n_action_steps
            self._queue.extend(self.chunk(batch, None).transpose(0, 1)[:steps])
        return self._queue.popleft()

    def _noises(self, count: int) -> list[np.ndarray]:
        shape, seed = self._policy.noise_shape, self._config.noise_seed
        if seed is None:
            return [*torch.randn((count, *shape)).numpy()]
        # As in omega-qvla's own episodes, which are paired by seed (evaluation/rollout.py).
        streams = (
            np.random.default_rng((seed + self._episodes + i, self._chunks)) for i in range(count)
        )
        return [stream.standard_normal(shape, dtype=np.float32) for stream in streams]


class LeRobotRunner:
    """LeRobot's own module with its linears replaced: its queues and its random numbers too."""

    continues = False  # its left-over would have to be normalized as its network has it

    def __init__(self, policy: LeRobotPolicy, config: OmegaQvlaConfig) -> None:
        if config.noise_seed is not None:
            raise PolicyError(
                "--policy.noise_seed is for pi0.5 and GR00T N1.5; this policy is sampled by "
                "LeRobot itself, whose random numbers lerobot-eval --seed sets"
            )
        if config.n_action_steps is not None:
            policy.module.config.n_action_steps = config.n_action_steps
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        self._policy.module.reset()

    def chunk(
        self,
        batch: Batch,
        noise: Tensor | None,
        delay: int | None = None,
        left_over: Tensor | None = None,
    ) -> Tensor:
        if delay is not None or left_over is not None:
            raise PolicyError(
                "LeRobot's own code runs this policy: it continues no chunk here (real-time "
                "chunking is for pi0.5, pi0 and GR00T N1.5)"
            )
        inputs = self._policy.preprocess(batch)
        given = {} if noise is None else {"noise": noise}
        with self._policy.stepping():
            actions = self._policy.module.predict_action_chunk(inputs, **given)
        return self._policy.postprocess(actions.to(torch.float32))

    def action(self, batch: Batch) -> Tensor:
        inputs = self._policy.preprocess(batch)
        with self._policy.stepping():
            action = self._policy.module.select_action(inputs)
        return self._policy.postprocess(action.to(torch.float32))


def _observations(batch: Batch, cameras: tuple[str, ...]) -> list[dict[str, Any]]:
    """LeRobot's batch as observations of omega-qvla; images are in [0, 1] there, bytes here."""
    missing = [name for name in cameras if IMAGE + name not in batch]
    if missing or STATE not in batch:
        raise ObservationError(
            f"the policy reads {', '.join(IMAGE + name for name in cameras)} and {STATE}; the "
            f"batch has {', '.join(batch)}: give --rename_map"
        )
    states = batch[STATE].to("cpu", torch.float32).numpy()
    prompts = batch.get("task") or [""] * len(states)
    prompts = [prompts] * len(states) if isinstance(prompts, str) else prompts
    images = {
        name: (batch[IMAGE + name].to("cpu", torch.float32) * 255.0)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .contiguous()
        .numpy()
        for name in cameras
    }
    return [
        {
            "images": {name: pixels[i] for name, pixels in images.items()},
            "state": states[i],
            "prompt": prompts[i],
        }
        for i in range(len(states))
    ]


def require_device(device: str, family: str) -> None:
    """Refuse a GPU for LeRobot's own modules.

    Raises:
        ResourceError: it cannot be done.
    """
    if family == LeRobotPolicy.family and device != "cpu":
        raise ResourceError(
            f"--policy.device={device}: a policy that LeRobot's own code runs is computed on the "
            "CPU; give --policy.device=cpu"
        )
