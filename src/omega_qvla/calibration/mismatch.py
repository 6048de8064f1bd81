"""Whether observations look like what a policy was trained on.

A policy knows its training data by the statistics it normalizes with.  They give every dimension of
the state an expected range:

| statistics | expected range |
|---|---|
| quantiles, minimum and maximum | between the two |
| mean and deviation | mean ± 3 deviations |
| sine and cosine of an angle | ± 2π, in radians |
| two values | [0, 1] |
| none | everything |

A dimension that Isaac-GR00T maps to 0 whatever it is (no spread in training) is not looked at.

**Refused** is a set where more than half of all numbers of the states lie outside, where more than
half of the images of a camera have one colour, or whose state has the policy's names in another
order.  In training 2 % lie outside by definition with quantiles of 1 and 99 %, 20 % with those of
10 and 90 %; another unit or another robot puts most of them outside.

**Warned of** is a dimension with more than a quarter of its numbers outside, or with one that is
farther outside than the range is wide; a camera that has images of one colour, or shows one image
alone; and a state whose names are not the policy's.

Noise (``Observations.random``) is only warned of: it is for measuring speed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omega_qvla.calibration.fingerprint import content_digest
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import CalibrationWarning, ObservationError
from omega_qvla.policies.base import Policy
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.processing.normalization import (
    Binary,
    MeanStd,
    Normalization,
    Parts,
    Quantiles,
    Range,
    SineCosine,
    dimension_names,
)
from omega_qvla.policies.processing.observations import (
    require_images,
    require_prompt,
    require_state,
)

MOST = 0.5
"""The part of the states' numbers, or of a camera's images, that refuses a set."""

MANY = 0.25
"""The part of a dimension's numbers that is warned of."""

_DEVIATIONS = 3.0
_NAMED = 4
_ONE_COLOUR = 1.0
"""Largest standard deviation of an image without content, in levels of 255."""


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        facts: one line of numbers: state, cameras, instructions; empty for noise.
        warnings: what should make one look twice, a sentence each.
        refusal: why the set should not be used; None if nothing speaks against it.
    """

    facts: str
    warnings: tuple[str, ...] = ()
    refusal: str | None = None

    def admit(self, *, allow: bool) -> list[str]:
        """All that is to be warned of.

        Args:
            allow: warn of what would be refused.

        Raises:
            ObservationError: the set is refused.
        """
        if self.refusal is None:
            return [*self.warnings]
        if not allow:
            raise ObservationError(
                f"{self.refusal}. Give data of the policy's own robot, in its units, or allow "
                "this: --allow-mismatch, in Python allow_mismatch=True"
            )
        return [f"allowed all the same: {self.refusal}", *self.warnings]


@dataclass(frozen=True)
class Expected:
    """The range of each dimension of a state, in the robot's units, float64 [n]."""

    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Camera:
    """The images of one camera.

    Attributes:
        mean, spread: of all pixels, in levels of 255.
        flat: how many images have one colour.
        count: how many images there are.
        distinct: how many of them differ.
    """

    mean: float
    spread: float
    flat: int
    count: int
    distinct: int


def check(policy: Policy, observations: Observations, limit: int, *, allow: bool) -> list[str]:
    """Warn of what is unlike the policy's training, and refuse what cannot be meant.

    Args:
        policy: nothing is known of a module of the user's own, which is never refused.
        observations: all that were given.
        limit: how many of them will be used.
        allow: warn of what would be refused.

    Returns:
        What was warned of (``CalibrationWarning``).

    Raises:
        ObservationError: see ``Findings.refusal``; or an observation does not fit the policy.
    """
    if not isinstance(policy, NativePolicy):
        return []
    told = examine(policy, observations, limit).admit(allow=allow)
    for text in told:
        warnings.warn(text, CalibrationWarning, stacklevel=3)
    return told


def examine(policy: NativePolicy, observations: Observations, limit: int) -> Findings:
    """Compare observations with the statistics of a policy.

    Args:
        policy: native.
        observations: all that were given.
        limit: how many of them will be used; those are looked at.

    Raises:
        ObservationError: an observation does not fit the policy.
    """
    source = observations.report
    if source is not None and source.noise:
        return Findings("", ("the observations are noise: fit to measure speed and memory only",))
    used = observations.spread(limit)
    cameras, states, instructions = _gather(policy, used)
    told, refusals = [], []
    facts = [f"{name} {_camera_facts(camera)}" for name, camera in cameras.items()]
    for name, camera in cameras.items():
        refused, warned = _camera_verdict(name, camera)
        refusals += refused
        told += warned
    if states is not None:
        statistics = policy.processor.statistics.state
        expected = expected_range(statistics, states.shape[-1])
        names = () if source is None else source.state
        fact, refused, warned = _state_verdict(
            states, expected, names, dimension_names(policy.processor.statistics.state)
        )
        facts = [fact, *facts]
        refusals += refused
        told += warned
    plural = "" if len(instructions) == 1 else "s"
    facts.append(f"{len(instructions)} instruction{plural}")
    refusal = f"the observations do not fit the policy: {'; '.join(refusals)}"
    return Findings("; ".join(facts), tuple(told), refusal if refusals else None)


def expected_range(normalization: Normalization, width: int) -> Expected:
    """The range of each of the first ``width`` dimensions, infinite where nothing is known."""
    low, high = np.full(width, -np.inf), np.full(width, np.inf)
    match normalization:
        case Parts(parts=parts):
            pieces = [expected_range(p.normalization, p.normalization.width) for p in parts]
            known = (
                np.concatenate([piece.low for piece in pieces]),
                np.concatenate([piece.high for piece in pieces]),
            )
        case Quantiles(q01=first, q99=second):
            known = np.asarray(first), np.asarray(second)
        case Range(low=first, high=second, flat_width=flat_width):
            known = np.asarray(first), np.asarray(second)
            ignored = (known[0] == known[1]) & (flat_width is None)
            known = np.where(ignored, -np.inf, known[0]), np.where(ignored, np.inf, known[1])
        case MeanStd(mean=mean, std=std):
            around = _DEVIATIONS * np.asarray(std)
            known = np.asarray(mean) - around, np.asarray(mean) + around
        case SineCosine(width=dimensions):
            known = np.full(dimensions, -2 * np.pi), np.full(dimensions, 2 * np.pi)
        case Binary(width=dimensions):
            known = np.zeros(dimensions), np.ones(dimensions)
        case _:
            return Expected(low, high)
    count = min(width, len(known[0]))
    low[:count], high[:count] = known[0][:count], known[1][:count]
    return Expected(low, high)


def _gather(
    policy: NativePolicy, observations: Observations
) -> tuple[dict[str, Camera], np.ndarray | None, set[str]]:
    """Cameras by name, states [N, n] float64 or None if the policy reads none, instructions."""
    config = policy.config
    reads_state = getattr(config, "state_in_prompt", True)
    images: dict[str, list[tuple[float, float, bytes]]] = {}
    states: list[np.ndarray] = []
    instructions: set[str] = set()
    for item in observations:
        shown = [n for n in config.cameras if item.get("image_masks", {}).get(n, True)]
        for name, image in zip(shown, require_images(item, config.cameras), strict=True):
            images.setdefault(name, []).append(
                (float(image.mean()), float(image.std()), content_digest(image))
            )
        if reads_state:
            states.append(require_state(item, config.state_dim))
        instructions.add(require_prompt(item))
    cameras = {name: _camera(found) for name, found in images.items()}
    return cameras, np.stack(states).astype(np.float64) if states else None, instructions


def _camera(found: Sequence[tuple[float, float, bytes]]) -> Camera:
    means, spreads = (np.array([row[i] for row in found]) for i in (0, 1))
    return Camera(
        mean=float(means.mean()),
        spread=float(np.sqrt(np.mean(spreads**2) + means.var())),
        flat=int((spreads < _ONE_COLOUR).sum()),
        count=len(found),
        distinct=len({row[2] for row in found}),
    )


def _camera_facts(camera: Camera) -> str:
    return f"mean {camera.mean:.0f} spread {camera.spread:.0f}"


def _camera_verdict(name: str, camera: Camera) -> tuple[list[str], list[str]]:
    """Refusals and warnings."""
    if camera.flat:
        text = (
            f"{camera.flat} of {camera.count} images of camera {name!r} have one colour "
            f"({_camera_facts(camera)})"
        )
        return ([text], []) if camera.flat > MOST * camera.count else ([], [text])
    if camera.distinct == 1 and camera.count > 1:
        return [], [f"all {camera.count} images of camera {name!r} are the same"]
    return [], []


def _state_verdict(
    states: np.ndarray, expected: Expected, given: Sequence[str], wanted: Sequence[str]
) -> tuple[str, list[str], list[str]]:
    """A line of numbers, refusals and warnings."""
    refusals, told = _order_verdict(given, wanted)
    width = expected.high - expected.low
    margin = 1e-6 * np.maximum(1.0, np.maximum(abs(expected.low), abs(expected.high)))
    margin = np.where(np.isfinite(margin), margin, 0.0)
    beyond = np.maximum(expected.low - margin - states, states - expected.high - margin)
    outside = beyond > 0
    shares: np.ndarray = np.mean(outside, axis=0)
    far: np.ndarray = np.any(outside & (beyond > width), axis=0)
    overall = float(outside.mean())
    fact = f"{overall:.1%} of the state outside the policy's statistics"
    names = wanted or given or [f"state[{i}]" for i in range(len(shares))]
    worst = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > MANY or far[i]]
    lines = [
        f"{names[i]} {shares[i]:.0%} outside [{expected.low[i]:.3g}, {expected.high[i]:.3g}], "
        f"from {states[:, i].min():.3g} to {states[:, i].max():.3g}"
        for i in worst[:_NAMED]
    ]
    if len(worst) > _NAMED:
        lines.append(f"and {len(worst) - _NAMED} more dimensions")
    if overall > MOST:
        refusals.append(f"{fact} ({'; '.join(lines)})")
    elif worst:
        told.append(f"{fact}: {'; '.join(lines)}")
    return fact, refusals, told


def _order_verdict(given: Sequence[str], wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """Refusals and warnings about names of the state's numbers."""
    if not given or not wanted or list(given) == list(wanted):
        return [], []
    if sorted(given) == sorted(wanted):
        text = (
            f"the policy's state is {', '.join(wanted)}, the data have {', '.join(given)}: the "
            "same numbers in another order (--state, in Python state=[…], puts them in order)"
        )
        return [text], []
    unknown = [name for name in wanted if name not in given]
    return [], [
        f"the policy's state is {', '.join(wanted)}, the data call their numbers "
        f"{', '.join(given)}: they are taken in this order, {len(unknown)} names differ"
    ]
