"""What the native policies have in common: noise, schedules, copies, descriptions.

A native policy is a network of this project, a processor between it and the robot, and a clock.
Sampling has three parts, which benchmarks time one by one: ``encode_images`` (images to tokens),
``prefill`` (tokens through the backbone, to all that denoising needs of an observation) and
``denoise``.  All
of them take several observations at once (``sample_batch``): every weight is then read once for
all.  Together they are a pass (``compute``), which whoever runs the policy may replace by something
that gives the same chunks faster (``use_pass``: a captured graph).
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.checkpoints.stored_tensors import StoredTensors
from omega_qvla.checkpoints.strict import dropped_count, map_strictly
from omega_qvla.checkpoints.weight_store import WeightStore
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.flow_time import FlowClock, euler_times
from omega_qvla.policies.base import Observation, Stage, State
from omega_qvla.policies.guidance import Guidance, together
from omega_qvla.policies.processing.normalization import NormalizationStatistics
from omega_qvla.policies.processing.observations import Encoded
from omega_qvla.policies.processing.previous_actions import encode_left_over
from omega_qvla.policies.processing.tokenizers import load_tokenizer
from omega_qvla.real_time_chunking import (
    DEFAULT_CHUNKING,
    LeftOver,
    RealTimeChunking,
    left_over_of,
)
from omega_qvla.threads import fitting_threads, torch_threads, widest_linear

if TYPE_CHECKING:
    from typing_extensions import Self

TOKENIZER = "tokenizer.json"
"""Name of the tokenizer's description in an artifact."""

Pass = Callable[[Sequence[Tensor], Tensor, int, "Guidance | None"], Tensor]
"""What ``NativePolicy.compute`` is: encoded inputs of B observations, noise [B, H, A], number of
steps and what the chunks continue → normalized chunks [B, H, A].  The chunks are the caller's to
keep."""


@runtime_checkable
class HasEmbodiments(Protocol):
    """A policy with layers of its own for every kind of robot."""

    def keep_embodiments(
        self, embodiments: Sequence[int], embodiment: int | None = None
    ) -> NativePolicy:
        """The same policy without the layers of other embodiments."""
        ...


class NativePolicy(ABC):
    """A policy with a network of this project, in full precision or quantized.

    Args:
        module: the network.
        processor: conversions to and from the robot's units.
        dropped_parameters: how many parameters the checkpoint held that inference never reads.
        store: where the parameters are that have no values in the module; such a policy can be
            quantized layer by layer but not run.
        decisions: what was decided about the checkpoint, question → answer, for its user to check:
            which code wrote it, and what the network is shown and gives because of that.
    """

    family: str
    config_type: type[Any]
    """Sizes and conventions, a frozen pydantic model; what it needs is in docs/add-a-policy.md."""
    module_type: type[nn.Module]
    """The network: made of a configuration, which it keeps as ``config``."""
    processor_type: type[Any]
    """Between the robot's units and the network's: made of configuration, statistics, tokenizer."""
    statistics_file: str = "statistics.json"
    """Name of the statistics in an artifact."""
    embedding_path: str
    """Where the token embedding sits in the module."""

    module: Any
    processor: Any
    config: Any

    def __init__(
        self,
        module: nn.Module,
        processor: Any,
        *,
        dropped_parameters: int = 0,
        store: WeightStore | None = None,
        decisions: Mapping[str, str] | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.processor = processor
        self.config = self.module.config
        self.clock = FlowClock()
        self.dropped_parameters = dropped_parameters
        self.store = store
        self.decisions: Mapping[str, str] = dict(decisions or {})
        self._schedules: dict[int, Any] = {}
        self._pass: Pass | None = None

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.module.parameters())
        return f"<{type(self).__name__} {self.family}, {size:,} parameters>"

    @property
    def device(self) -> torch.device:
        """Where the network computes; observations and noise are brought there."""
        return next(self.module.parameters()).device

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(horizon, action_dim) of the noise ``sample_actions`` starts from."""
        return self.config.horizon, self.config.action_dim

    @property
    def steps(self) -> int:
        """Default number of denoising steps."""
        return self.config.steps

    @classmethod
    def of_processor(cls, processor: Any, *, dropped_parameters: int = 0) -> Self:
        """The policy of a processor and its configuration, parameters on the meta device.

        Args:
            processor: of ``processor_type``.
            dropped_parameters: as for the class.
        """
        with torch.device("meta"):
            module = cls.module_type(processor.config)
        return cls(module, processor, dropped_parameters=dropped_parameters)

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What ``skeleton`` needs to rebuild everything but the tensors: (config, files)."""
        files = {
            self.statistics_file: self.processor.statistics.dump().encode(),
            TOKENIZER: json.dumps(self.processor.tokenizer.dump()).encode(),
            **self.processor.tokenizer.files(),
        }
        return self.config.model_dump(mode="json"), files

    @classmethod
    def skeleton(cls, config: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        """A policy whose parameters are on the meta device, from what ``describe`` returned.

        Raises:
            PolicyError: the configuration or a file is missing or invalid.
        """
        missing = [name for name in (cls.statistics_file, TOKENIZER) if name not in files]
        if missing:
            raise PolicyError(
                f"this {cls.family} description is invalid: it has no {', '.join(missing)}"
            )
        try:
            parsed, name = cls.config_type.model_validate(config), cls.statistics_file
            statistics = NormalizationStatistics.parse(files[name], name)
            tokenizer = load_tokenizer(json.loads(files[TOKENIZER]), TOKENIZER, files)
        except ValueError as error:
            raise PolicyError(f"this {cls.family} description is invalid: {error}") from error
        return cls.of_processor(cls.processor_type(parsed, statistics, tokenizer))

    def read_from(
        self,
        stored: StoredTensors,
        dropped: Mapping[str, tuple[int, ...]],
        decisions: Mapping[str, str],
    ) -> Self:
        """Take the parameters from a checkpoint, from now on and when they are needed.

        Args:
            stored: the checkpoint, under the module's names.
            dropped: what it may hold although inference never reads it, and its shapes.
            decisions: see the class; those made while the tensors were named are added.

        Raises:
            PolicyError: the checkpoint has not exactly the module's parameters.
        """
        self.store = map_strictly(self.module, stored, dropped=dropped)
        self.dropped_parameters = dropped_count(stored, dropped)
        self.decisions = {**decisions, **stored.decisions}
        return self

    @abstractmethod
    def component_of(self, parameter: str) -> str:
        """The part of the policy a parameter belongs to, for memory tables."""

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """The forward pass as calibration stages, in execution order."""

    @abstractmethod
    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        """The state the first stage starts from; ``generator`` draws the sampling noise."""

    def encode(
        self,
        observation: Observation,
        left_over: LeftOver | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> Encoded:
        """All that ``sample_batch`` needs of one observation.

        Args:
            observation: as for ``sample_actions``.
            left_over: what its chunk is to continue, in the robot's units; None: nothing.
            chunking: how it is continued.

        Raises:
            ObservationError: the processor refuses it, or the left-over is of other actions.
        """
        processor = self.processor
        inputs, anchor = processor.encode(observation), processor.anchor(observation)
        guidance = None
        if left_over is not None:
            guidance = encode_left_over(
                left_over,
                chunking,
                anchor,
                processor.relative_actions,
                processor.statistics.actions,
                self.noise_shape,
                self.config.robot_action_dim,
            )
        return Encoded(inputs, anchor, guidance)

    @abstractmethod
    def encode_images(self, inputs: Sequence[Tensor]) -> Any:
        """What the processor encodes of B observations → image tokens, and what else ``prefill``
        wants.
        """

    @abstractmethod
    def prefill(self, encoded: Any) -> Any:
        """What ``encode_images`` returned → all that denoising reads of the observation."""

    @abstractmethod
    def denoise(
        self, observed: Any, noise: Tensor, steps: int, guidance: Guidance | None = None
    ) -> Tensor:
        """What ``prefill`` returned and noise [B, H, A] → normalized chunk [B, H, A]."""

    def compute(
        self,
        inputs: Sequence[Tensor],
        noise: Tensor,
        steps: int,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """All that the network computes of B chunks, between the processor's encode and decode.

        Args:
            inputs: what the processor encodes of B observations, concatenated.
            noise: [B, H, A] standard normal, on the network's device.
            steps: number of denoising steps.
            guidance: what the chunks continue, on the network's device, or None.

        Returns:
            [B, H, A], normalized.
        """
        return self.denoise(self.prefill(self.encode_images(inputs)), noise, steps, guidance)

    def use_pass(self, replacement: Pass) -> None:
        """Sample through something that gives what ``compute`` gives; a copy starts without it."""
        self._pass = replacement

    @cached_property
    def _widest(self) -> int:
        """Looked up once: what replaces a module is as wide."""
        return widest_linear(self.module)

    def _fitting_threads(self) -> AbstractContextManager[None]:
        """Inside the block PyTorch has as many threads as the network is worth."""
        return torch_threads(fitting_threads(self._widest))

    def _chunks(
        self,
        inputs: Sequence[Tensor],
        noise: Tensor,
        steps: int | None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        run = self.compute if self._pass is None else self._pass
        if guidance is not None:
            guidance = Guidance(*(part.to(self.device) for part in guidance))
        return run(inputs, noise, self.steps if steps is None else steps, guidance)

    def clone(self) -> Self:
        """A structural copy that shares every tensor: modules may be replaced in it freely."""
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return type(self)(
            copy.deepcopy(self.module, shared),
            self.processor,
            dropped_parameters=self.dropped_parameters,
            store=self.store,
            decisions=self.decisions,
        )

    def with_steps(self, steps: int) -> Self:
        """The same policy with another default number of denoising steps, to which it calibrates.

        Raises:
            PolicyError: not a positive number.
        """
        if steps < 1:
            raise PolicyError(f"{steps} denoising steps: at least one is needed")
        other = self.clone()
        other.config = self.config.model_copy(update={"steps": steps})
        other.module.config = other.config
        other.processor = replace(self.processor, config=other.config)
        return other

    def schedule(self, steps: int) -> Any:
        """What an Euler schedule needs of the flow times, computed once per number of steps."""
        if steps not in self._schedules:
            with torch.inference_mode():
                times = torch.tensor(euler_times(steps), device=self.device)
                self._schedules[steps] = self.make_schedule(times)
        return self._schedules[steps]

    @abstractmethod
    def make_schedule(self, times: Tensor) -> Any:
        """What depends on the flow times [S] alone."""

    @torch.inference_mode()
    def sample_normalized(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One chunk in the network's normalized units, [horizon, robot_action_dim] float32.

        What the network puts into the padding beyond the robot's own dimensions is no action.
        """
        return self._sample(self.encode(observation), self._noise(noise, generator), steps)

    def _sample(self, encoded: Encoded, noise: Tensor, steps: int | None) -> Tensor:
        """The normalized chunk of one observation."""
        with self._fitting_threads():
            chunk = self._chunks(encoded.inputs, noise, steps, encoded.guidance)[0]
            return chunk[:, : self.config.robot_action_dim]

    @torch.inference_mode()
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
        """One action chunk in the robot's units.

        Args:
            observation: ``images`` (uint8 [H, W, 3] per camera), ``state`` [state_dim], ``prompt``.
            noise: [horizon, action_dim] standard normal; drawn from ``generator`` when absent.
            steps: number of denoising steps; the policy's default when absent.
            generator: source of randomness when ``noise`` is absent (freshly seeded if absent too).
            previous: [T, robot_action_dim], what is not carried out yet of the chunk before, as
                this method returned it; the first action belongs to the moment of ``observation``.
                The new chunk continues it (``real_time_chunking.py``).  None: it begins anew.
            delay: how many of them will be carried out before this chunk is there; together with
                ``previous`` only.
            chunking: how ``previous`` is continued; without it nothing is.

        Returns:
            [horizon, robot_action_dim] float32.

        Raises:
            ObservationError: the processor refuses the observation; the noise or ``previous`` is
                misshaped or not finite; ``delay`` is no number of steps that ``previous`` has, or
                one of the two is missing.
        """
        encoded = self.encode(observation, left_over_of(previous, delay), chunking)
        chunk = self._sample(encoded, self._noise(noise, generator), steps)
        return self.processor.decode(chunk, encoded.anchor)

    @torch.inference_mode()
    def sample_noises(
        self, observation: Observation, noises: Sequence[np.ndarray], *, steps: int | None = None
    ) -> Tensor:
        """Chunks of one observation for several noises, in one pass.

        Args:
            noises: [horizon, action_dim] standard normal each.
            steps: number of denoising steps; the policy's default when absent.

        Returns:
            [K, horizon, robot_action_dim] float32, normalized.

        Raises:
            ObservationError: as ``sample_actions``.
        """
        with self._fitting_threads():
            start = torch.cat([self._noise(noise, None) for noise in noises])
            inputs = self.processor.encode(observation)
            repeated = [part.repeat_interleave(len(start), dim=0) for part in inputs]
            chunks = self._chunks(repeated, start, steps)
            return chunks[..., : self.config.robot_action_dim].cpu()

    @torch.inference_mode()
    def sample_batch(
        self,
        encoded: Sequence[Encoded],
        noises: Sequence[np.ndarray],
        *,
        steps: int | None = None,
    ) -> list[np.ndarray]:
        """One action chunk for each of several observations.

        Observations alike in number of cameras and of tokens share one forward pass, so nothing is
        padded; the others follow in passes of their own.  The integers of a row do not depend on
        its neighbours; floating-point sums may be ordered by the size of the batch.  Each chunk
        continues what its own observation was encoded with.

        Args:
            encoded: what ``encode`` gives of each observation.
            noises: [horizon, action_dim] standard normal each.
            steps: number of denoising steps; the policy's default when absent.

        Returns:
            [horizon, robot_action_dim] float32 in the robot's units, in the order given.

        Raises:
            ObservationError: a noise is misshaped or not finite.
        """
        starts = [self._noise(noise, None) for noise in noises]
        inputs = [each.inputs for each in encoded]
        chunks: dict[int, np.ndarray] = {}
        for rows in _alike(inputs):
            with self._fitting_threads():
                pairs = zip(*(inputs[i] for i in rows), strict=True)
                stacked = [torch.cat(parts) for parts in pairs]
                start = torch.cat([starts[i] for i in rows])
                guidance = together([encoded[i].guidance for i in rows])
                batch = self._chunks(stacked, start, steps, guidance)
            for i, chunk in zip(rows, batch, strict=True):
                chunks[i] = self.processor.decode(chunk, encoded[i].anchor)
        return [chunks[i] for i in range(len(inputs))]

    def _noise(
        self, noise: np.ndarray | Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        if noise is None:
            if generator is None:
                generator = torch.Generator()
                generator.seed()
            drawn = torch.randn((1, *self.noise_shape), generator=generator)
            return drawn.to(self.device)
        given = torch.as_tensor(noise, dtype=torch.float32)
        if tuple(given.shape) != self.noise_shape:
            raise ObservationError(
                f"noise must have shape {list(self.noise_shape)}, got {list(given.shape)}"
            )
        if not bool(torch.isfinite(given).all()):
            raise ObservationError("noise has NaN or Inf")
        return given.unsqueeze(0).to(self.device)


def _alike(inputs: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """The numbers of the inputs, those of equal shapes together."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, tensors in enumerate(inputs):
        groups.setdefault(tuple(tensor.shape for tensor in tensors), []).append(i)
    return list(groups.values())


def of_embodiment(policy: NativePolicy, embodiment: str | None) -> NativePolicy:
    """The policy with the layers of one robot alone.

    Args:
        policy: with layers for several robots.
        embodiment: the robot's number; None leaves the policy as it is.

    Raises:
        PolicyError: the policy has no such robot.
    """
    if embodiment is None:
        return policy
    if not isinstance(policy, HasEmbodiments):
        raise PolicyError(
            f"a {policy.family} policy has no layers per embodiment; leave `embodiment` out"
        )
    known = [str(number) for number in policy.config.embodiments]
    if embodiment not in known:
        raise PolicyError(
            f"this policy has no embodiment {embodiment!r}; it has the numbers {', '.join(known)}"
        )
    return policy.keep_embodiments((int(embodiment),), int(embodiment))
