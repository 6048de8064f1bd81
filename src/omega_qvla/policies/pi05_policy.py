"""pi0.5 from observation to action chunk: the network, its processor and its clock together."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.base import FlowClock, Observation, Stage, State, euler_times
from omega_qvla.policies.images import FITS
from omega_qvla.policies.normalization import NormalizationStatistics
from omega_qvla.policies.pi05 import (
    Pi05Config,
    Pi05Module,
    remove_modulation,
    sample_chunk,
)
from omega_qvla.policies.pi05_stages import MODULATION_PATHS, component_of, pi05_stages
from omega_qvla.policies.processing import (
    Tokenizer,
    discretize_state,
    format_prompt,
    load_tokenizer,
    require_images,
    require_prompt,
    require_state,
)
from omega_qvla.policies.step_table import StepTable
from omega_qvla.policies.weight_store import WeightStore, hold

Modulation = Callable[[Tensor], Tensor]
"""Flow times [T] → adaptive-norm modulation [T, norms, 3, D]."""


@dataclass(frozen=True)
class Pi05Processor:
    """Turns the robot's observation into tensors, and normalized chunks into actions."""

    config: Pi05Config
    statistics: NormalizationStatistics
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        """Statistics and tokenizer must fit the network.

        Raises:
            PolicyError: too few quantiles, or token ids beyond the embedding.
        """
        for name, normalization, width in (
            ("state", self.statistics.state, self.config.state_dim),
            ("actions", self.statistics.actions, self.config.robot_action_dim),
        ):
            if normalization.width < width:
                raise PolicyError(
                    f"there are statistics of {normalization.width} dimensions of {name}, the "
                    f"robot has {width}"
                )
        if self.tokenizer.size > self.config.vocabulary:
            raise PolicyError(
                f"the tokenizer has {self.tokenizer.size} tokens, the embedding "
                f"{self.config.vocabulary}"
            )

    def encode(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Observation → (pixels [1, V, 3, S, S] in [-1, 1], token ids [1, T]).

        Raises:
            ObservationError: something is missing, misshaped, not finite or too long.
        """
        images = require_images(observation, self.config.cameras)
        size = self.config.vision.image_size
        fit = FITS[self.config.image_fit]
        pixels = torch.stack([fit(image, size) for image in images])
        tokens = self._tokens(self.prompt(observation))
        if len(tokens) > self.config.prompt_length:
            raise ObservationError(
                f"the prompt has {len(tokens)} tokens, this policy takes at most "
                f"{self.config.prompt_length}"
            )
        return pixels.unsqueeze(0), torch.tensor([tokens])

    def prompt(self, observation: Observation) -> str:
        """The full prompt, with the state written into it where the policy wants that."""
        instruction = require_prompt(observation)
        if not self.config.state_in_prompt:
            return format_prompt(instruction, None)
        state = require_state(observation, self.config.state_dim)
        normalized = self.statistics.state.normalize(state)
        if self.config.prompt_state_dim is not None:
            missing = self.config.prompt_state_dim - normalized.shape[-1]
            normalized = np.pad(normalized, (0, max(0, missing)))
        return format_prompt(instruction, discretize_state(normalized))

    def _tokens(self, prompt: str) -> list[int]:
        """Token ids; a closing line break is a token of its own, as openpi encodes it."""
        if not prompt.endswith("\n"):
            return self.tokenizer.encode(prompt)
        start = len(self.tokenizer.encode(""))
        return [*self.tokenizer.encode(prompt[:-1]), *self.tokenizer.encode("\n")[start:]]

    def decode(self, chunk: Tensor) -> np.ndarray:
        """Normalized chunk [H, A] → robot actions [H, robot_action_dim], float32."""
        robot = chunk[:, : self.config.robot_action_dim].to(torch.float32).cpu().numpy()
        return self.statistics.actions.unnormalize(robot)


class Pi05Policy:
    """A pi0.5 policy, full precision or with quantized modules in place of its linears.

    Args:
        module: the network.
        processor: conversions to and from the robot's units.
        modulation: replaces the network's own adaptive-norm branch (a quantized policy stores a
            table over flow time instead of the dense layers).
        dropped_parameters: how many parameters the checkpoint held that inference never reads.
        store: where the parameters are that have no values in the module; such a policy can be
            quantized layer by layer but not run.
    """

    family = "pi05"

    def __init__(
        self,
        module: Pi05Module,
        processor: Pi05Processor,
        *,
        modulation: Modulation | None = None,
        dropped_parameters: int = 0,
        store: WeightStore | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.processor = processor
        self.config = module.config
        self.clock = FlowClock()
        self.dropped_parameters = dropped_parameters
        self.store = store
        self._modulation = modulation or module.step_modulation
        self.step_table: StepTable | None = None
        self._schedules: dict[int, Tensor] = {}

    @property
    def noise_shape(self) -> tuple[int, int]:
        """(horizon, action_dim) of the noise ``sample_actions`` starts from."""
        return self.config.horizon, self.config.action_dim

    @property
    def steps(self) -> int:
        """Default number of denoising steps."""
        return self.config.steps

    @property
    def embedding_path(self) -> str:
        """Where the token embedding sits in the module."""
        return "paligemma_with_expert.paligemma.model.language_model.embed_tokens"

    def tabulate_modulation(self, step_counts: Iterable[int]) -> StepTable:
        """The adaptive norms as a table, exact for these step counts and the policy's own."""
        norms = (name for name, _ in self.module.named_modules() if name.endswith(".dense"))
        with hold(self.module, self.store, (*MODULATION_PATHS, *norms)):
            return StepTable.tabulate(self._modulation, {*step_counts, self.steps})

    def clone(self) -> Pi05Policy:
        """A structural copy that shares every tensor: modules may be replaced in it freely."""
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        return Pi05Policy(
            copy.deepcopy(self.module, shared),
            self.processor,
            dropped_parameters=self.dropped_parameters,
            store=self.store,
        )

    def use_step_table(self, table: StepTable) -> None:
        """Read adaptive-norm modulation from a table; the layers that computed it are removed.

        Raises:
            ValueError: the table is not of this network's shape.
        """
        rows, width = table.times.numel(), self.config.expert.width
        expected = (rows, self.config.norms, 3, width)
        fits = table.times.ndim == 1 and rows > 0 and tuple(table.values.shape) == expected
        if not fits or table.values.dtype != torch.float32:
            raise ValueError(
                f"step_table.values is {table.values.dtype} {list(table.values.shape)} with times "
                f"{list(table.times.shape)}, expected torch.float32 {list(expected)}"
            )
        if bool((table.times.diff() >= 0).any()):
            raise ValueError("step_table.times must be strictly descending")
        remove_modulation(self.module)
        self._modulation = table.at
        self.step_table = table
        self._schedules.clear()

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What ``skeleton`` needs to rebuild everything but the tensors: (config, files)."""
        files = {
            "norm_stats.json": self.processor.statistics.dump().encode(),
            "tokenizer.json": json.dumps(self.processor.tokenizer.dump()).encode(),
            **self.processor.tokenizer.files(),
        }
        return self.config.model_dump(mode="json"), files

    @classmethod
    def skeleton(cls, config: Mapping[str, Any], files: Mapping[str, bytes]) -> Pi05Policy:
        """A policy whose parameters are on the meta device, from what ``describe`` returned.

        Raises:
            PolicyError: the configuration or a file is missing or invalid.
        """
        try:
            parsed = Pi05Config.model_validate(config)
            statistics = NormalizationStatistics.parse(files["norm_stats.json"], "norm_stats.json")
            tokenizer = load_tokenizer(json.loads(files["tokenizer.json"]), "tokenizer.json", files)
        except (ValidationError, KeyError, ValueError) as error:
            raise PolicyError(f"the artifact's pi0.5 description is invalid: {error}") from error
        with torch.device("meta"):
            module = Pi05Module(parsed)
        return cls(module, Pi05Processor(parsed, statistics, tokenizer))

    def component_of(self, parameter: str) -> str:
        """The part of the policy a parameter belongs to, for memory tables."""
        return component_of(parameter)

    def stages(self) -> Sequence[Stage]:
        return pi05_stages(self.module, self.clock, self.steps)

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        pixels, token_ids = self.processor.encode(observation)
        noise = torch.randn((1, *self.noise_shape), generator=generator)
        return {"pixels": pixels, "token_ids": token_ids, "noise": noise}

    def schedule(self, steps: int) -> Tensor:
        """Modulation rows of an Euler schedule, computed once per number of steps."""
        if steps not in self._schedules:
            with torch.inference_mode():
                self._schedules[steps] = self._modulation(torch.tensor(euler_times(steps)))
        return self._schedules[steps]

    @torch.inference_mode()
    def sample_normalized(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One chunk in the network's normalized units, [horizon, action_dim] float32."""
        pixels, token_ids = self.processor.encode(observation)
        start = self._noise(noise, generator)
        schedule = self.schedule(self.steps if steps is None else steps)
        prefix = self.module.embed_prefix(pixels, token_ids)
        positions = torch.arange(prefix.shape[1]).unsqueeze(0)
        cache, _ = self.module.prefill(prefix, positions)
        return sample_chunk(self.module, cache, prefix.shape[1], start, schedule, self.clock)[0]

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """One action chunk in the robot's units.

        Args:
            observation: ``images`` (uint8 [H, W, 3] per camera), ``state`` [state_dim], ``prompt``.
            noise: [horizon, action_dim] standard normal; drawn from ``generator`` when absent.
            steps: number of denoising steps; the policy's default when absent.
            generator: source of randomness when ``noise`` is absent (freshly seeded if absent too).

        Returns:
            [horizon, robot_action_dim] float32.

        Raises:
            ObservationError: see ``Pi05Processor.encode``; or the noise is misshaped.
        """
        chunk = self.sample_normalized(observation, noise, steps=steps, generator=generator)
        return self.processor.decode(chunk)

    def _noise(
        self, noise: np.ndarray | Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        if noise is None:
            if generator is None:
                generator = torch.Generator()
                generator.seed()
            return torch.randn((1, *self.noise_shape), generator=generator)
        given = torch.as_tensor(noise, dtype=torch.float32)
        if tuple(given.shape) != self.noise_shape:
            raise ObservationError(
                f"noise must have shape {list(self.noise_shape)}, got {list(given.shape)}"
            )
        if not bool(torch.isfinite(given).all()):
            raise ObservationError("noise has NaN or Inf")
        return given.unsqueeze(0)
