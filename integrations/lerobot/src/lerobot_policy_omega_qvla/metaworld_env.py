"""omega-qvla's Meta-World tasks as an environment of LeRobot's: ``--env.type=omega_metaworld``.

The physics, the seeds and the pictures are those of ``omega-qvla eval``, so that success can be
compared episode by episode.  LeRobot's own Meta-World has other cameras, other start positions and
another state; a policy trained on one does not see what it knows in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

SIDE, STATES, ACTIONS = 84, 4, 4
CAMERAS = ("base", "wrist")


@EnvConfig.register_subclass("omega_metaworld")
@dataclass
class OmegaMetaworldEnv(EnvConfig):
    """One task; ``--env.task=`` names it as ``omega-qvla eval --tasks`` does."""

    task: str | None = "drawer-open-v3"
    fps: int = 20
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (ACTIONS,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (STATES,)),
            **{
                f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, (SIDE, SIDE, 3))
                for name in CAMERAS
            },
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS},
        }
    )

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """``n_envs`` simulators of the task."""
        apart = use_async_envs and n_envs > 1
        made = gymnasium.vector.AsyncVectorEnv if apart else gymnasium.vector.SyncVectorEnv
        several = made(
            [partial(_Task, str(self.task), self.fps)] * n_envs,
            autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        )
        return {self.type: {0: several}}


class _Task(gymnasium.Env[dict[str, Any], np.ndarray]):
    """Observations under LeRobot's names."""

    def __init__(self, task: str, fps: int) -> None:
        from omega_qvla.evaluation.simulators.metaworld import MetaWorldEnv
        from omega_qvla.evaluation.simulators.metaworld_tasks import TASKS

        self._env = MetaWorldEnv(task, SIDE)
        self.task, self.task_description = task, self._env.instruction
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = "rgb_array"
        self._max_episode_steps = TASKS[task].max_steps
        picture = spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(CAMERAS, picture)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (STATES,), np.float32),
            }
        )
        self.action_space = self._env.action_space
        self._shown: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        del options
        observation, _ = self._env.reset(seed=seed)
        return self._named(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        space = self._env.action_space
        clipped = np.clip(np.asarray(action, np.float32), space.low, space.high)
        observation, reward, terminated, truncated, info = self._env.step(clipped)
        return self._named(observation), float(reward), terminated, truncated, info

    def render(self) -> np.ndarray:
        return self._shown["pixels"]["base"]

    def close(self) -> None:
        self._env.close()

    def _named(self, observation: dict[str, Any]) -> dict[str, Any]:
        self._shown = {"pixels": dict(observation["images"]), "agent_pos": observation["state"]}
        return self._shown
