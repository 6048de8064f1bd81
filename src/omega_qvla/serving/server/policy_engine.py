"""The policy as a server sees it: observations in, checked chunks out, several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import Policy
from omega_qvla.policies.families import titles
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    Normalization,
    Parts,
    Quantiles,
    Range,
)
from omega_qvla.policies.processing.robots import HasRobot, Robot
from omega_qvla.policies.processing.tokenizers import WordTokenizer
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, LeftOver, RealTimeChunking
from omega_qvla.serving.server.safety import ActionLimits
from omega_qvla.serving.wire.specification import LAYOUTS, Layout, Specification

Array = npt.NDArray[np.float32]

_DEVIATIONS = 3.0
"""Where statistics are mean and deviation, the range is taken as this many deviations each way."""
_WARM_UP_PROMPT = "pick up the object"
_WARM_UP_SIDE = 224


class Engine(Protocol):
    """What the scheduler computes with."""

    def encode(self, observation: Mapping[str, Any], left_over: LeftOver | None = None) -> Any:
        """What one observation becomes, and what its chunk continues.

        Raises:
            OmegaError: the policy refuses it.
        """
        ...

    def sample(self, inputs: Sequence[Any], noises: Sequence[Array]) -> Sequence[Array]:
        """One chunk [horizon, action_dim] for each encoded observation."""
        ...

    def prepare_thread(self) -> None:
        """Called once in the thread that will compute."""
        ...


class PolicyEngine:
    """A native policy, quantized or in full precision.

    Args:
        policy: of ``load_policy``, or the one inside what ``load`` gives.
        threads: of PyTorch and of the kernels, in the thread that computes.
        steps: denoising steps; None: the policy's own.
        chunking: how a chunk continues its robot's last one.

    Raises:
        PolicyError: a module of the user's own, which does not say what it needs.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        threads: int = 1,
        steps: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> None:
        if not isinstance(policy, NativePolicy):
            raise PolicyError(
                f"a {policy.family!r} policy cannot be served: only {titles()} describe the "
                "observations they need"
            )
        self._policy = policy
        self._threads, self._steps, self._chunking = threads, steps, chunking

    def encode(self, observation: Mapping[str, Any], left_over: LeftOver | None = None) -> Any:
        """Tensors of one observation, what its actions are counted from and what they continue."""
        return self._policy.encode(observation, left_over, self._chunking)

    def sample(self, inputs: Sequence[Any], noises: Sequence[Array]) -> Sequence[Array]:
        """Chunks in the robot's units; observations alike share one forward pass."""
        return self._policy.sample_batch(inputs, noises, steps=self._steps)

    def prepare_thread(self) -> None:
        """PyTorch counts its threads per calling thread."""
        torch.set_num_threads(self._threads)

    @property
    def robot(self) -> Robot:
        """Conventions of the robot, where the policy has some."""
        processor = self._policy.processor
        return processor.robot if isinstance(processor, HasRobot) else Robot()

    def specification(self, layout: Layout | None = None) -> Specification:
        """What requests must hold.

        Args:
            layout: how robots name observations; None takes the policy's own.

        Raises:
            PolicyError: the layout is for other cameras.
        """
        config, statistics = self._policy.config, self._policy.processor.statistics
        robot = self.robot
        return Specification(
            cameras=tuple(config.cameras),
            state_dim=config.state_dim,
            horizon=config.horizon,
            action_dim=config.robot_action_dim,
            noise_shape=self._policy.noise_shape,
            state_parts=_parts(statistics.state),
            action_parts=_parts(statistics.actions),
            layout=layout or LAYOUTS[robot.layout or "native"],
            default_prompt=robot.default_prompt,
            reset_pose=robot.reset_pose,
            decisions=self._policy.decisions,
        )

    def limits(self, margin: float) -> ActionLimits:
        """Action limits out of the statistics the policy was trained with.

        Args:
            margin: how far beyond the range of the statistics an action may go, as a share of
                that range.

        Raises:
            PolicyError: some dimension has no statistics.
        """
        width = self._policy.config.robot_action_dim
        low, high = self._action_range()
        if not bool(np.isfinite(low).all() and np.isfinite(high).all()):
            raise PolicyError(
                "the policy has no action statistics to take limits from; give your own with "
                "`limits`, a JSON file (or none, if something else keeps the robot safe)"
            )
        spread = margin * (high - low)
        return ActionLimits(
            tuple((low - spread).tolist()), tuple((high + spread).tolist()), (np.inf,) * width
        )

    def _action_range(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Bounds of the actions as the robot gets them; a relative one is added to a state."""
        processor = self._policy.processor
        width = self._policy.config.robot_action_dim
        low, high = (bound[:width].copy() for bound in _range(processor.statistics.actions))
        mask = processor.relative_actions
        if any(mask):
            for bound, state in zip((low, high), _range(processor.statistics.state), strict=True):
                bound[: len(mask)] += np.where(mask, state[: len(mask)], 0.0)
        if isinstance(processor, HasRobot):
            ends = processor.robot_units(low), processor.robot_units(high)
            return np.minimum(*ends), np.maximum(*ends)
        return low, high

    def warm_up_observation(self) -> dict[str, Any]:
        """Black images and a state of zeros: it takes the time of any other observation."""
        config = self._policy.config
        tokenizer = self._policy.processor.tokenizer
        prompt = _WARM_UP_PROMPT
        if isinstance(tokenizer, WordTokenizer):
            prompt = next(word for word in reversed(tokenizer.vocabulary) if word.isalpha())
        image = np.zeros((_WARM_UP_SIDE, _WARM_UP_SIDE, 3), np.uint8)
        return {
            "images": dict.fromkeys(config.cameras, image),
            "state": np.zeros(config.state_dim, np.float32),
            "prompt": prompt,
        }


def _parts(normalization: Normalization) -> tuple[tuple[str, int], ...]:
    if not isinstance(normalization, Parts):
        return ()
    return tuple((part.name, part.normalization.width) for part in normalization.parts)


def _range(normalization: Normalization) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Bounds [width] of what the statistics have seen; infinite where there are none."""
    match normalization:
        case Quantiles(q01=low, q99=high) | Range(low=low, high=high):
            return np.asarray(low), np.asarray(high)
        case MeanStd(mean=mean, std=std):
            reach = _DEVIATIONS * np.asarray(std)
            return np.asarray(mean) - reach, np.asarray(mean) + reach
        case Binary(width=width):
            return np.zeros(width), np.ones(width)
        case Parts(parts=parts):
            pieces = [_range(cast(Normalization, part.normalization)) for part in parts]
            lows, highs = zip(*pieces, strict=True)
            return np.concatenate(lows), np.concatenate(highs)
        case _:
            return np.full(normalization.width, -np.inf), np.full(normalization.width, np.inf)
