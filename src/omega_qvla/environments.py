"""What is asked of a simulator, a ``gymnasium.Env``, and how actions are carried out in it.

An observation is a mapping with ``images`` (name → uint8 [H, W, 3]), ``state`` (numbers [D]) and
``prompt`` (text), as the policies take it.  The action space is a ``Box`` of one dimension; actions
are clipped to it.  An episode ends when a step terminates or truncates; whether it was solved is
``info["is_success"]`` of that step.

Gymnasium's ``step`` returns what is seen, so it renders after every action, and a policy looks only
once per chunk.  An environment may therefore offer :class:`RendersOnDemand`; then physics run alone
until the policy is asked again.

Nothing of gymnasium is imported here: a simulator may live in an interpreter of its own, with
numpy and nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import SimulatorError

Observation = Mapping[str, Any]

MOST_STEPS = 100_000
"""An episode that is longer never ends."""
IS_SUCCESS = "is_success"
_DOCUMENT = "docs/evaluate-your-robot.md"


class Environment(Protocol):
    """As much of ``gymnasium.Env`` as is used."""

    action_space: Any

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]: ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]: ...

    def close(self) -> None: ...


@runtime_checkable
class RendersOnDemand(Protocol):
    """An environment whose physics can run without a picture of every step."""

    def advance(self, action: Any) -> tuple[bool, bool, dict[str, Any]]:
        """One control step: (terminated, truncated, info)."""
        ...

    def observe(self) -> Observation:
        """What is seen now."""
        ...


@dataclass(frozen=True)
class CarriedOut:
    """What became of some actions.

    Attributes:
        steps: how many were carried out; fewer than given where the episode ended.
        success: whether the episode ended solved.
        observation: what is seen now; None where the episode is over.
    """

    steps: int
    success: bool
    observation: Observation | None


def begin(environment: Environment, seed: int) -> Observation:
    """Start the episode of a seed.

    Raises:
        SimulatorError: what was returned is not what is asked of an environment.
    """
    answer: Any = environment.reset(seed=seed)
    if not isinstance(answer, tuple) or len(cast(tuple[Any, ...], answer)) != 2:
        raise _fault(environment, "reset(seed=...) must return (observation, info)", answer)
    return _checked(environment, answer[0])


def carry_out(environment: Environment, actions: Iterable[npt.NDArray[Any]]) -> CarriedOut:
    """Carry out actions until they, or the episode, are over.

    Raises:
        SimulatorError: as :func:`begin`.
    """
    steps = 0
    observation: Any = None
    for action in actions:
        if isinstance(environment, RendersOnDemand):
            terminated, truncated, info = environment.advance(action)
        else:
            answer: Any = environment.step(action)
            if not isinstance(answer, tuple) or len(cast(tuple[Any, ...], answer)) != 5:
                wanted = "step must return (observation, reward, terminated, truncated, info)"
                raise _fault(environment, wanted, answer)
            observation, _, terminated, truncated, info = answer
        steps += 1
        if terminated or truncated:
            if IS_SUCCESS not in info:
                wanted = f"the info of an episode's last step must have {IS_SUCCESS!r}"
                raise _fault(environment, wanted, info)
            return CarriedOut(steps, bool(info[IS_SUCCESS]), None)
    if isinstance(environment, RendersOnDemand):
        observation = environment.observe()
    return CarriedOut(steps, False, _checked(environment, observation))


def action_limits(environment: Environment) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Lowest and highest action, each float32 [action_dim].

    Raises:
        SimulatorError: the action space is no Box of one dimension.
    """
    space = getattr(environment, "action_space", None)
    low, high = (np.asarray(getattr(space, name, None)) for name in ("low", "high"))
    if low.ndim != 1 or low.shape != high.shape or low.dtype.kind != "f":
        wanted = "action_space must be a gymnasium.spaces.Box of floats with one dimension"
        raise _fault(environment, wanted, space)
    return low.astype(np.float32), high.astype(np.float32)


def _checked(environment: Environment, observation: Any) -> Observation:
    found = observation if isinstance(observation, Mapping) else None
    images = None if found is None else cast(Mapping[str, Any], found).get("images")
    fits = (
        found is not None
        and isinstance(images, Mapping)
        and all(_is_image(image) for image in cast(Mapping[str, Any], images).values())
        and np.asarray(found.get("state")).ndim == 1
        and isinstance(found.get("prompt"), str)
    )
    if not fits:
        wanted = (
            'an observation must be {"images": {name: uint8 [H, W, 3]}, "state": numbers [D], '
            '"prompt": text}'
        )
        raise _fault(environment, wanted, _described(observation))
    return cast(Observation, observation)


def _is_image(image: Any) -> bool:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3


def _described(value: Any) -> Any:
    """Types and shapes in the place of arrays."""
    if isinstance(value, Mapping):
        content = cast(Mapping[Any, Any], value)
        return {key: _described(item) for key, item in content.items()}
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return value if isinstance(value, str) else type(value).__name__


def _fault(environment: Environment, wanted: str, found: Any) -> SimulatorError:
    name = type(environment).__name__
    return SimulatorError(f"{name}: {wanted} ({_DOCUMENT}); it is {found!r:.200}")
