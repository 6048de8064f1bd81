"""``TorchPolicy``: any PyTorch module of the user's own, made quantizable by naming its parts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import (
    Component,
    FlowClock,
    Observation,
    QuantizationSite,
    Stage,
    State,
)
from omega_qvla.policies.weight_store import WeightStore

Sampler = Callable[[nn.Module, Any, Any, FlowClock], Any]
"""(module, observation, noise, clock) → actions."""


class TorchPolicy:
    """Wraps a module so that ``omega_qvla.quantize`` can quantize it.

    Args:
        module: the network; it is never modified.
        backbone: pattern matched with ``re.fullmatch`` against the names of the module's
            ``nn.Linear``s; those run once per observation.  None: no backbone.
        action_head: the same for linears that run once per denoising step.  None: no action head.
        sample: ``sample(module, observation, noise, clock)`` runs the policy once.  It enters
            ``with clock.step(i, t):`` around denoising step i at flow time t.
        steps: number of denoising steps ``sample`` makes.
        step_module: for loops that cannot be edited: the name of a submodule called exactly once
            per denoising step; its calls advance the clock, with t = 1 - i/steps.
        noise_shape: shape of the standard-normal noise handed to ``sample`` during calibration.
            Without it, an observation's own ``"noise"`` entry is used, else None.

    Raises:
        PolicyError: a pattern is invalid or matches no linear, a linear is matched twice, or
            ``step_module`` does not exist.
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
        self.clock = FlowClock()
        self.backbone, self.action_head = backbone, action_head
        self.step_module = step_module
        self.dropped_parameters = 0
        self.store: WeightStore | None = None  # all parameters of the user's module are in memory
        self.decisions: Mapping[str, str] = {}
        self.noise_shape = None if noise_shape is None else tuple(noise_shape)
        self._sites = _match_sites(module, backbone, action_head)
        if step_module is not None and step_module not in dict(module.named_modules()):
            raise PolicyError(f"step_module {step_module!r} is not a submodule")

    def clone(self) -> TorchPolicy:
        """A structural copy that shares every tensor: modules may be replaced in it freely.

        It is in evaluation mode: a quantized policy is never trained.
        """
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        twin = copy.copy(self)
        twin.clock = FlowClock()
        twin.module = copy.deepcopy(self.module, shared).eval()
        return twin

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Nothing but the family: the structure is the user's code, given again to ``load``."""
        return {"family": self.family, "steps": self.steps}, {}

    def component_of(self, parameter: str) -> str:
        """The part of the policy a parameter belongs to, for memory tables."""
        for site in self._sites:
            if parameter.startswith(f"{site.name}."):
                return site.component
        return "other"

    def stages(self) -> Sequence[Stage]:
        """One stage: nothing is known of the module's inside, so calibration runs it whole."""
        return [Stage("the whole module", self._run, self._sites)]

    def initial_state(self, observation: Observation, generator: torch.Generator) -> State:
        if self.noise_shape is not None:
            noise = torch.randn(self.noise_shape, generator=generator)
        else:
            noise = observation.get("noise") if hasattr(observation, "get") else None
        return {"observation": observation, "noise": noise}

    def sample_actions(
        self,
        observation: Observation,
        noise: np.ndarray | torch.Tensor | None = None,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Whatever ``sample`` returns for this observation and noise."""
        if steps is not None and steps != self.steps:
            raise PolicyError(
                "the number of steps of a TorchPolicy is fixed by its sample function"
            )
        if noise is None and generator is not None and self.noise_shape is not None:
            noise = torch.randn(self.noise_shape, generator=generator)
        with torch.no_grad(), self._counted_steps():
            return self.sample(self.module, observation, noise, self.clock)

    def _run(self, state: State) -> State:
        self.sample_actions(state["observation"], state["noise"])
        return state

    def _counted_steps(self) -> AbstractContextManager[None]:
        if self.step_module is None:
            return nullcontext()
        return _steps_by_calls(self.module.get_submodule(self.step_module), self.clock, self.steps)


@contextmanager
def _steps_by_calls(module: nn.Module, clock: FlowClock, steps: int) -> Iterator[None]:
    """Inside the block, the n-th forward call of ``module`` is denoising step n.

    Hooks exist only while the policy is sampled, so the user's module stays as it was and whatever
    stands in its place by then is counted.
    """
    calls = 0

    def enter(_module: nn.Module, _inputs: Any) -> None:
        nonlocal calls
        if calls >= steps:
            raise PolicyError(
                f"step_module was called more than {steps} times in one sample; "
                "set steps= to the number of denoising steps"
            )
        clock.index, clock.time = calls, 1.0 - calls / steps
        calls += 1

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        clock.index = clock.time = None

    # First in and last out: the module may itself be a linear that others watch.
    handles = (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        clock.index = clock.time = None


def _match_sites(
    module: nn.Module, backbone: str | None, action_head: str | None
) -> tuple[QuantizationSite, ...]:
    # The module itself has no name: it cannot be replaced inside itself.
    named = [(name, child) for name, child in module.named_modules() if name]
    linears = [name for name, child in named if isinstance(child, nn.Linear)]
    chosen: dict[str, Component] = {}
    parts: tuple[tuple[Component, str | None], ...] = (
        ("backbone", backbone),
        ("action_head", action_head),
    )
    for component, pattern in parts:
        if pattern is None:
            continue
        try:
            matched = [name for name in linears if re.fullmatch(pattern, name)]
        except re.error as error:
            raise PolicyError(f"{component} pattern {pattern!r} is invalid: {error}") from error
        if not matched:
            raise PolicyError(
                f"{component} pattern {pattern!r} matches no nn.Linear; names are like "
                f"{', '.join(linears[:5]) or '(the module has none)'}"
            )
        for name in matched:
            if name in chosen:
                raise PolicyError(f"{name!r} matches both the backbone and the action head pattern")
            chosen[name] = component
    if not chosen:
        raise PolicyError("give a backbone or an action_head pattern: nothing would be quantized")
    return tuple(
        QuantizationSite(name, (name,), chosen[name], per_step=chosen[name] == "action_head")
        for name in linears
        if name in chosen
    )
