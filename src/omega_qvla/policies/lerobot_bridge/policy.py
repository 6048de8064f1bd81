"""A policy of LeRobot's as everything here sees one: LeRobot's module, sampled by LeRobot's code.

``sample_actions`` takes an observation in this project's form (images, state, prompt), lets
LeRobot's preprocessor, network and postprocessor run one after the other, and gives actions in the
robot's units.  Noise is an argument where LeRobot takes it; elsewhere a seed is, from which
PyTorch's own generator is set for the time of one sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.errors import ArtifactError, ObservationError, PolicyError, ResourceError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import Observation, State
from omega_qvla.policies.lerobot_bridge.building import build_empty
from omega_qvla.policies.lerobot_bridge.coverage import CoverageRow, coverage
from omega_qvla.policies.lerobot_bridge.empty import cast, require_filled
from omega_qvla.policies.lerobot_bridge.kinds import Backbones, Kind, kind_of
from omega_qvla.policies.lerobot_bridge.library import lerobot_version
from omega_qvla.policies.lerobot_bridge.pipelines import Pipelines, build_pipelines
from omega_qvla.policies.lerobot_bridge.watching import Left, Watched, leave_out, watch
from omega_qvla.policies.processing.observations import require_prompt, require_state
from omega_qvla.policies.slots import AbsentLinear
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.real_time_chunking import DEFAULT_CHUNKING, RealTimeChunking

IMAGE, STATE = "observation.images.", "observation.state"
_SEED_BELOW = 1 << 62


@dataclass(frozen=True)
class Network:
    """A module of LeRobot's, and what it was built from.

    Attributes:
        name: LeRobot's type.
        module: LeRobot's policy.
        content: its ``config.json``.
        backbones: what LeRobot has asked a hub for to build it.
    """

    name: str
    module: Any
    content: Mapping[str, Any]
    backbones: Backbones

    @property
    def kind(self) -> Kind:
        """How it is sampled."""
        return kind_of(self.name)


class LeRobotPolicy(TorchPolicy):
    """LeRobot's own policy; see the module.

    Args:
        network: the module.
        pipelines: its processors.
        watched: which linears are quantized.
        rows: the coverage report.

    Attributes:
        cameras: names of the images that an observation has.
        state_dim: width of the state, 0 for a policy without one.
    """

    family = "lerobot"

    def __init__(
        self,
        network: Network,
        pipelines: Pipelines,
        watched: Watched,
        rows: Sequence[CoverageRow],
    ) -> None:
        kind = network.kind
        super().__init__(
            network.module,
            sample=partial(_sample, kind),
            steps=watched.steps,
            backbone=_exactly(watched.once),
            action_head=_exactly(watched.per_step),
            step_module=kind.step,
            noise_shape=None if kind.noise is None else kind.noise(network.module.config),
        )
        self.network, self.pipelines, self.watched = network, pipelines, watched
        self.coverage = tuple(rows)
        self.decisions: Mapping[str, str] = {
            "run by": f"LeRobot {lerobot_version()}, its type {network.name}"
        }
        self.dropped_parameters = sum(
            row["parameters"] for row in rows if row["treatment"] == "left out"
        )
        self.cameras, self.state_dim = _inputs(network)

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What builds the policy again, without tensors, and the files of its processors."""
        known = super().describe()[0]
        kept = ("steps", "linears", "dtype", "other_dtypes")
        return {
            "family": self.family,
            **{key: known[key] for key in kept},
            "lerobot": lerobot_version(),
            "type": self.network.name,
            "policy": dict(self.network.content),
            "backbones": dict(self.network.backbones),
            "kept": [[left.reason, list(left.names)] for left in self.watched.kept],
            "absent": list(self.watched.absent),
            "coverage": [dict(row) for row in self.coverage],
        }, dict(self.pipelines.files)

    def preprocess(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """LeRobot's preprocessor on a batch, or a single item, of LeRobot's own names."""
        return self.pipelines.preprocessor(dict(batch))

    def postprocess(self, actions: Tensor) -> Tensor:
        """LeRobot's postprocessor: normalized actions → the robot's units."""
        return self.pipelines.postprocessor(actions)

    @contextmanager
    def stepping(self) -> Generator[None, None, None]:
        """Inside the block the module may be called as LeRobot calls it, at most one chunk."""
        self._steps_made.forget()
        try:
            with torch.no_grad(), self._counted_steps():
                yield
        finally:
            self.clock.index = self.clock.time = None

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        noise = self._noise(observation, None, generator)
        return {"observation": self.preprocess(self.batch_of(observation)), "noise": noise}

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        previous: np.ndarray | Tensor | None = None,
        delay: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> np.ndarray:
        """One action chunk, [T, A] float32 in the robot's units.

        Args:
            observation: ``images`` (uint8 [H, W, 3] by camera), ``state`` [state_dim], ``prompt``.
            noise: standard normal of the policy's ``noise_shape``, [T, A] too; where LeRobot takes
                none, a seed, int64 [1].  Drawn when absent.
            steps: nothing else than the policy's own.
            generator: source of randomness when noise is drawn (freshly seeded if absent).
            previous, delay, chunking: refused: these networks continue no chunk.

        Raises:
            ObservationError: the observation lacks something, or the noise is misshaped.
            PolicyError: the module is not used as it was when it was quantized; or there is a
                previous chunk.
        """
        batch = self.preprocess(self.batch_of(observation))
        chunk = super().sample_actions(
            batch,
            noise,
            steps=steps,
            generator=generator,
            previous=previous,
            delay=delay,
            chunking=chunking,
        )
        actions = self.postprocess(chunk.to(torch.float32))
        return np.ascontiguousarray(actions[0].to("cpu", torch.float32).numpy())

    def batch_of(self, observation: Observation) -> dict[str, Any]:
        """An observation under LeRobot's names, as its datasets give it: images in [0, 1].

        Raises:
            ObservationError: a camera, the state or the prompt is missing or misshaped.
        """
        images = observation.get("images")
        images = images if isinstance(images, Mapping) else {}
        batch: dict[str, Any] = {}
        for name in self.cameras:
            image = np.asarray(images.get(name))
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ObservationError(
                    f"the policy needs an image of camera {name!r}, uint8 [H, W, 3]; the "
                    f"observation has {', '.join(map(str, images)) or 'none'}"
                )
            batch[IMAGE + name] = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
        if self.state_dim:
            state = require_state(observation, self.state_dim)
            batch[STATE] = torch.as_tensor(np.asarray(state, np.float32))
        batch["task"] = require_prompt(observation)
        return batch

    def _noise(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None,
        generator: torch.Generator | None,
    ) -> Tensor | None:
        if self.noise_shape is not None:
            if noise is not None and tuple(noise.shape) == self.noise_shape[1:]:
                noise = torch.as_tensor(noise)[None]
            return super()._noise({}, noise, generator)
        if not self.network.kind.random:
            return None
        if noise is None:
            drawn = torch.Generator() if generator is None else generator
            if generator is None:
                drawn.seed()
            return torch.randint(_SEED_BELOW, (1,), generator=drawn)
        given = torch.as_tensor(noise)
        if given.dtype != torch.int64 or given.shape != (1,):
            raise ObservationError(
                f"LeRobot's {self.network.name} takes no noise: give a seed, int64 [1], as noise, "
                f"or a generator; got {given.dtype} {list(given.shape)}"
            )
        return given

    def _run(self, state: State) -> State:
        TorchPolicy.sample_actions(self, state["observation"], state["noise"])
        return state

    @classmethod
    def of(cls, network: Network, pipelines: Pipelines) -> LeRobotPolicy:
        """A full-precision policy: its linears are sorted by watching one sample.

        Raises:
            PolicyError: LeRobot's code does not run as the type's list says.
        """
        watched = watch(network.module, network.kind.step, _probe(network, pipelines))
        return cls(network, pipelines, watched, coverage(network.module, watched))

    @classmethod
    def skeleton(cls, config: Mapping[str, Any], files: Mapping[str, bytes]) -> LeRobotPolicy:
        """The structure of a policy, its weights without memory, from what ``describe`` returned.

        Raises:
            ResourceError: LeRobot is not there, or of another version than the artifact's.
            ArtifactError: the description is incomplete.
            PolicyError: LeRobot cannot build it.
        """
        installed = lerobot_version()
        if config.get("lerobot") != installed:
            raise ResourceError(
                f"the artifact was made with LeRobot {config.get('lerobot')}, whose code it runs; "
                f"LeRobot {installed} is installed: install lerobot=={config.get('lerobot')}, or "
                "quantize the policy again"
            )
        try:
            name, content = str(config["type"]), config["policy"]
            backbones, linears = config["backbones"], config["linears"]
            watched = Watched(
                steps=int(config["steps"]),
                once=tuple(linears["backbone"]),
                per_step=tuple(linears["action_head"]),
                kept=tuple(Left(reason, tuple(names)) for reason, names in config["kept"]),
                absent=tuple(config["absent"]),
            )
            rows, dtypes = config["coverage"], (config["dtype"], config["other_dtypes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"omega_config.json does not describe a policy: {error}") from error
        module = build_empty(name, content, backbones)
        _require_linears(module, (*watched.once, *watched.per_step, *watched.absent))
        leave_out(module, watched.absent)
        cast(module, *dtypes)
        require_filled(module)
        pipelines = build_pipelines(files, name)
        network = Network(name, module, content, backbones)
        return cls(network, pipelines, watched, rows)


def _sample(kind: Kind, module: Any, batch: Any, noise: Any, clock: FlowClock) -> Tensor:
    """One chunk of a batch, [B, T, A], normalized; what LeRobot writes into is a copy."""
    del clock  # calls of the step are counted
    module.reset()
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
    if kind.noise is not None or not kind.random:
        return kind.chunk(module, copies, noise)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(noise))
    try:
        return kind.chunk(module, copies, None)
    finally:
        torch.set_rng_state(state)


def _probe(network: Network, pipelines: Pipelines) -> Callable[[nn.Module], Tensor]:
    """Samples an observation of random pixels, in the shapes of the configuration."""
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {"task": "pick up the object"}
    for name, feature in (network.module.config.input_features or {}).items():
        drawn = torch.rand(tuple(feature.shape), generator=generator)
        batch[name] = drawn if name.startswith(IMAGE) else 2.0 * drawn - 1.0
    ready = pipelines.preprocessor(batch)
    config, kind = network.module.config, network.kind
    noise = torch.zeros(1, dtype=torch.int64)
    if kind.noise is not None:
        noise = torch.randn(kind.noise(config), generator=generator)
    return lambda module: _sample(kind, module, ready, noise, FlowClock())


def _exactly(names: Sequence[str]) -> str | None:
    return "|".join(map(re.escape, names)) or None


def _inputs(network: Network) -> tuple[tuple[str, ...], int]:
    """Cameras and width of the state; what is neither is refused."""
    features = network.module.config.input_features or {}
    cameras = tuple(name.removeprefix(IMAGE) for name in features if name.startswith(IMAGE))
    others = [name for name in features if not name.startswith(IMAGE) and name != STATE]
    if others:
        raise PolicyError(
            f"the policy reads {', '.join(others)}: observations here have images "
            f"({IMAGE}NAME), a state ({STATE}) and a prompt, and nothing else"
        )
    return cameras, int(features[STATE].shape[0]) if STATE in features else 0


def _require_linears(module: nn.Module, names: Sequence[str]) -> None:
    modules = dict(module.named_modules())
    missing = [n for n in names if not isinstance(modules.get(n), nn.Linear | AbsentLinear)]
    if missing:
        raise ArtifactError(
            f"LeRobot builds the policy without {', '.join(missing[:3])}, which the artifact has"
        )
