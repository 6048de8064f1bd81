"""``TorchPolicy``: any PyTorch module of the user's own, made quantizable by naming its parts."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from omega_qvla.checkpoints.weight_store import WeightStore
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import Observation, QuantizationSite, Stage, State
from omega_qvla.policies.denoising_calls import RecordingClock, step_of, steps_by_calls
from omega_qvla.policies.linear_matching import match_sites
from omega_qvla.policies.slots import forget_shared
from omega_qvla.real_time_chunking import (
    DEFAULT_CHUNKING,
    LeftOver,
    RealTimeChunking,
    left_over_of,
)

AS_MODULE = (
    "quantize it where it runs, as a module of your own: load it there and wrap it in "
    "omega_qvla.TorchPolicy (docs/torch-policy.md)"
)
"""What to do with a policy that this version does not build; ends an error's sentence."""

FOREIGN = ("torch", "lerobot")
"""Families of policies whose network is other people's code."""

Sampler = Callable[..., Any]
"""(module, observation, noise, clock) → actions; also left_over and chunking, if it names them."""


class TorchPolicy:
    """Wraps a module so that ``omega_qvla.quantize`` can quantize it.

    Args:
        module: the network; it is never modified.
        backbone: pattern matched with ``re.fullmatch`` against the names of the module's
            ``nn.Linear``s; those run once per observation.  None: no backbone.
        action_head: the same for linears that run once per denoising step.  None: no action head.
        sample: ``sample(module, observation, noise, clock)`` runs the policy once and returns its
            actions.  Everything random comes out of ``noise``: the same observation and noise give
            the same actions.  With an action head it enters ``with clock.step(i, t):`` around
            every denoising step, i = 0, 1, … steps - 1, at the flow time t in [0, 1] (1 is noise;
            other schedules are scaled to that range), rising or falling from step to step.
            A ``sample`` that can continue the previous chunk has the parameters ``left_over`` (a
            ``LeftOver`` in the units of its own actions, or None) and ``chunking`` as well.
        steps: number of denoising steps ``sample`` makes; 1 for a policy without denoising.
        step_module: for loops that cannot be edited: the name of a submodule, or of a method of
            one (``"model.denoise_step"``), that is called exactly once per denoising step; its
            calls advance the clock, with t = 1 - i/steps.
        noise_shape: shape of the standard-normal noise that ``sample`` starts from, batch included
            if it expects one.  ``noise`` is then a tensor of this shape: the one given to
            ``sample_actions`` (an array becomes a tensor), or drawn, float32.  Without it ``noise``
            is what was given, or the observation's own ``"noise"`` entry, or None.

    Raises:
        PolicyError: a pattern is invalid or matches no linear, a linear is matched twice or is more
            than an ``nn.Linear``, or ``step_module`` does not exist.
    """

    family = "torch"

    def __init__(
        self,
        module: nn.Module,
        *,
        sample: Sampler,
        steps: int = 1,
        backbone: str | None = None,
        action_head: str | None = None,
        step_module: str | None = None,
        noise_shape: Sequence[int] | None = None,
    ) -> None:
        if steps < 1:
            raise PolicyError(f"steps must be at least 1, got {steps}")
        self.module = module
        self.sample = sample
        self.steps = steps
        self._steps_made = RecordingClock()
        self.clock: FlowClock = self._steps_made
        self.backbone, self.action_head = backbone, action_head
        self.step_module = step_module
        self.dropped_parameters = 0
        self.store: WeightStore | None = None  # all parameters of the user's module are in memory
        self.decisions: Mapping[str, str] = {}
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)
        self._use_sites(match_sites(module, backbone, action_head))
        if step_module is not None and step_of(module, step_module) is None:
            raise PolicyError(
                f"step_module {step_module!r} is not a submodule, nor a method of one"
            )

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.module.parameters())
        return f"<TorchPolicy {type(self.module).__name__}, {size:,} parameters>"

    def clone(self) -> TorchPolicy:
        """A structural copy that shares every tensor: modules may be replaced in it freely.

        It is in evaluation mode: a quantized policy is never trained.
        """
        shared: dict[int, Any] = {
            id(t): t for t in (*self.module.parameters(), *self.module.buffers())
        }
        twin = copy.copy(self)
        twin.clock = twin._steps_made = shared[id(self.clock)] = RecordingClock()
        try:
            twin.module = copy.deepcopy(self.module, shared).eval()
        except (RuntimeError, TypeError) as error:
            raise PolicyError(
                f"the module cannot be copied ({error}); it must work with copy.deepcopy: keep "
                "locks, files and tensors with gradients out of its attributes"
            ) from error
        return twin

    @property
    def sites(self) -> tuple[QuantizationSite, ...]:
        """What is quantized, in the order of the module."""
        return self._sites

    def with_sites(self, sites: Sequence[QuantizationSite]) -> TorchPolicy:
        """The same policy, its linears divided into sites in another way."""
        twin = copy.copy(self)
        twin._use_sites(sites)
        return twin

    def _use_sites(self, sites: Sequence[QuantizationSite]) -> None:
        self._sites = tuple(sites)
        self._components = {name: site.component for site in sites for name in site.linears}

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What a module given again to ``load`` can be held against; the structure is its code."""
        kinds = {name: str(tensor.dtype) for name, tensor in _floating(self.module)}
        common = Counter(kinds.values()).most_common(1)
        usual = common[0][0] if common else str(torch.float32)
        return {
            "family": self.family,
            "steps": self.steps,
            "backbone": self.backbone,
            "action_head": self.action_head,
            "step_module": self.step_module,
            "noise_shape": None if self.noise_shape is None else list(self.noise_shape),
            "linears": {
                part: [name for name, component in self._components.items() if component == part]
                for part in ("backbone", "action_head")
            },
            "dtype": usual,
            "other_dtypes": {name: kind for name, kind in sorted(kinds.items()) if kind != usual},
        }, {}

    def component_of(self, parameter: str) -> str:
        """The part of the policy a parameter belongs to, for memory tables."""
        return self._components.get(parameter.rpartition(".")[0], "other")

    def stages(self) -> Sequence[Stage]:
        """One stage: nothing is known of the module's inside, so calibration runs it whole."""
        return [Stage("the whole module", self._run, self._sites)]

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        return {"observation": observation, "noise": self._noise(observation, None, generator)}

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | torch.Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        previous: np.ndarray | torch.Tensor | None = None,
        delay: int | None = None,
        chunking: RealTimeChunking = DEFAULT_CHUNKING,
    ) -> Any:
        """Whatever ``sample`` returns for this observation and noise.

        Args:
            observation: as ``sample`` takes it.
            noise: what to start from; see ``noise_shape``.  Drawn when absent.
            steps: nothing else than the policy's own.
            generator: source of randomness when noise is drawn (freshly seeded if absent).
            previous: [T, action_dim], what is not carried out yet of the chunk before, in the
                units ``sample`` returns.
            delay: how many of them will be carried out before this chunk is there.
            chunking: how they are continued.

        Raises:
            PolicyError: the denoising steps are not what the policy says; or there is a previous
                chunk, and ``sample`` does not say that it can continue one.
            ObservationError: the noise is misshaped or not finite; or see ``LeftOver``.
        """
        if steps is not None and steps != self.steps:
            raise PolicyError(
                "the number of steps of a TorchPolicy is fixed by its sample function"
            )
        continued = self._continued(left_over_of(previous, delay), chunking)
        start = self._noise(observation, noise, generator)
        self._steps_made.forget()
        try:
            with torch.no_grad(), self._counted_steps():
                actions = self.sample(self.module, observation, start, self.clock, **continued)
        finally:
            self.clock.index = self.clock.time = None
            forget_shared(self.module)
        per_step = next((site.linears[0] for site in self._sites if site.per_step), None)
        if per_step is not None:
            self._steps_made.check(self.steps, self.step_module, per_step)
        return actions

    def _continued(self, left_over: LeftOver | None, chunking: RealTimeChunking) -> dict[str, Any]:
        """What ``sample`` is told of the previous chunk."""
        told = {"left_over": left_over, "chunking": chunking}
        with suppress(ValueError):  # a callable that does not say what it takes
            if told.keys() <= inspect.signature(self.sample).parameters.keys():
                return told
        if left_over is not None:
            raise PolicyError(
                "previous was given, but this policy's sample function continues no chunk: give it "
                "the parameters left_over and chunking too (docs/real-time-chunking.md)"
            )
        return {}

    def _noise(
        self,
        observation: Observation,
        noise: np.ndarray | torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor | None:
        if self.noise_shape is None:
            if noise is None and isinstance(observation, Mapping):
                noise = observation.get("noise")
            return torch.as_tensor(noise) if isinstance(noise, np.ndarray) else noise
        if noise is None:
            if generator is None:
                generator = torch.Generator()
                generator.seed()
            return torch.randn(self.noise_shape, generator=generator)
        given = torch.as_tensor(noise)
        if tuple(given.shape) != self.noise_shape:
            raise ObservationError(
                f"noise must have shape {list(self.noise_shape)}, got {list(given.shape)}"
            )
        if not bool(torch.isfinite(given).all()):
            raise ObservationError("noise has NaN or Inf")
        return given

    def _run(self, state: State) -> State:
        self.sample_actions(state["observation"], state["noise"])
        return state

    def _counted_steps(self) -> AbstractContextManager[None]:
        if self.step_module is None:
            return nullcontext()
        return steps_by_calls(self.module, self.step_module, self.clock, self.steps)


def _floating(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and stored buffers of floating point or complex numbers, by name."""
    return [
        (name, tensor)
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())
    ]
