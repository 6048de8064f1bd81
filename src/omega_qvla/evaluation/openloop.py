"""Open-loop action error: how far a quantized policy's chunks are from full precision.

Let b_i be the chunk of the full-precision policy for a held-out observation and a noise, and a_i
that of the policy under test for the same observation and the same noise.  The error is the
relative mean squared error, pooled over everything,

    error = Σ_i ‖a_i - b_i‖² / Σ_i ‖b_i‖².

It is computed in the network's normalized action units when both policies offer them through
``sample_normalized(observation, noise=...)``; otherwise in the robot's units.  Normalized units
weigh every action dimension alike.

The **noise floor** puts the number in proportion: the same formula for the full-precision policy
against itself, with two independent noises.  An error far below the floor is smaller than the
policy's own sampling spread.

The error is heavy-tailed: where full precision is undecided between two behaviours, a small error
decides, and a handful of such chunks make up half of the sum.  With one noise per observation equal
methods differ by a factor of two; ``NOISES`` are drawn for each, and a policy that can
(``sample_noises``) answers all of them in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from omega_qvla.errors import NonFiniteError, ObservationError, PolicyError

Array = npt.NDArray[np.float64]

NOISES = 8
"""Noises per held-out observation in comparisons."""


class Sampler(Protocol):
    """What evaluation needs of a policy.

    ``sample_normalized(observation, noise=...)``, same signature and in the network's units, is
    optional; so are ``sample_noises(observation, noises)``, the same for several noises at once,
    and ``sample_batch(encoded, noises)`` with ``encode``, for several observations.
    """

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """(horizon, action_dim) of the noise."""
        ...

    def sample_actions(self, observation: Any, noise: Any = None) -> Any:
        """[horizon, action_dim] float32 in the robot's units."""
        ...


def draw_noises(
    policy: Sampler, count: int | tuple[int, int], seed: int
) -> npt.NDArray[np.float32]:
    """Standard-normal noises [*count, horizon, action_dim] float32, a function of ``seed``.

    Raises:
        PolicyError: see :func:`shape_of_noise`.
    """
    generator = np.random.default_rng(seed)
    counts = (count,) if isinstance(count, int) else count
    return generator.standard_normal((*counts, *shape_of_noise(policy)), dtype=np.float32)


def shape_of_noise(policy: Sampler) -> tuple[int, int]:
    """(horizon, action_dim) of a policy's noise.

    Raises:
        PolicyError: the policy does not say; a ``TorchPolicy`` must be given ``noise_shape``.
    """
    shape = tuple(policy.noise_shape or ())
    if len(shape) != 2:
        raise PolicyError(
            f"evaluation needs a policy with noise_shape=(horizon, action_dim), got {shape or None}"
        )
    return shape


def offers_normalized(policy: Sampler) -> bool:
    """Whether a policy can be sampled in the network's normalized action units."""
    return callable(getattr(policy, "sample_normalized", None))


def sample_chunks(
    policy: Sampler,
    observations: Sequence[Any],
    noises: npt.ArrayLike,
    *,
    normalized: bool,
) -> Array:
    """One chunk per pair of observation and noise, of the noises' shape.

    Args:
        noises: [n, horizon, action_dim], one per observation, or [n, k, horizon, action_dim].
        normalized: the network's units instead of the robot's.

    Raises:
        ObservationError: no observations, or another number of noises.
        NonFiniteError: a chunk contains NaN or Inf; names the observation.
    """
    given = np.asarray(noises, dtype=np.float32)
    if not observations:
        raise ObservationError("action error needs at least one held-out observation")
    if len(given) != len(observations):
        raise ObservationError(f"{len(observations)} observations but {len(given)} noises")
    chunks: list[Array] = []
    for index, (observation, noise) in enumerate(zip(observations, given, strict=True)):
        chunk = _sample(policy, observation, noise, normalized=normalized)
        if not np.isfinite(chunk).all():
            raise NonFiniteError(f"the chunk for held-out observation {index} is not finite")
        chunks.append(chunk)
    return np.stack(chunks)


def _sample(policy: Sampler, observation: Any, noise: Any, *, normalized: bool) -> Array:
    """Chunks of one observation for a noise [horizon, action_dim], or for several of them."""
    together = getattr(policy, "sample_noises", None)
    if noise.ndim == 3 and normalized and together is not None:
        return np.asarray(together(observation, noise), dtype=np.float64)
    if noise.ndim == 3:
        alone = [_sample(policy, observation, one, normalized=normalized) for one in noise]
        return np.stack(alone)
    name = "sample_normalized" if normalized else "sample_actions"
    sample = cast(Callable[..., Any], getattr(policy, name))
    return np.asarray(sample(observation, noise=noise), dtype=np.float64)


def sample_together(
    policy: Sampler, observations: Sequence[Any], noises: Sequence[npt.NDArray[np.float32]]
) -> list[Any]:
    """One chunk per observation in the robot's units, in one pass if the policy offers that.

    Raises:
        ObservationError: the policy refuses an observation.
    """
    batch = getattr(policy, "sample_batch", None)
    if batch is None or len(observations) == 1:
        pairs = zip(observations, noises, strict=True)
        return [policy.sample_actions(observation, noise=noise) for observation, noise in pairs]
    encode = cast(Any, policy).encode
    return batch([encode(observation) for observation in observations], noises)


@dataclass(frozen=True)
class Measurement:
    """What a policy answers to the held-out observations.

    Attributes:
        normalized: whether the chunks are in the network's units instead of the robot's.
        chunks: [n, k, horizon, action_dim] float64, k noises per observation.
        floor: relative error between two noises; full precision only, else None.
    """

    normalized: bool
    chunks: Array
    floor: float | None


def measure_reference(
    policy: Sampler, observations: Sequence[Any], seed: int, noises: int = NOISES
) -> Measurement:
    """Full precision on the held-out observations, with its noise floor.

    Raises:
        ObservationError, NonFiniteError: see :func:`sample_chunks`.
    """
    normalized = offers_normalized(policy)
    counts = len(observations), noises
    drawn, others = (draw_noises(policy, counts, s) for s in (seed, seed + 1))
    chunks = sample_chunks(policy, observations, drawn, normalized=normalized)
    varied = sample_chunks(policy, observations, others, normalized=normalized)
    return Measurement(normalized, chunks, relative_error(varied, chunks))


def measure_row(
    policy: Sampler,
    observations: Sequence[Any],
    seed: int,
    noises: int = NOISES,
    *,
    normalized: bool,
) -> Measurement:
    """A policy on the same observations and noises as its reference, in the reference's units.

    Raises:
        PolicyError: it is to be compared in the network's units and does not offer them.
        ObservationError, NonFiniteError: see :func:`sample_chunks`.
    """
    if normalized and not offers_normalized(policy):
        raise PolicyError("needs sample_normalized, which its reference has")
    drawn = draw_noises(policy, (len(observations), noises), seed)
    chunks = sample_chunks(policy, observations, drawn, normalized=normalized)
    return Measurement(normalized, chunks, None)


def relative_error(chunks: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """Σ (chunks - reference)² / Σ reference², in float64.

    Raises:
        ValueError: different shapes, or a reference that is zero everywhere.
    """
    return float(np.sum(error_shares(chunks, reference)))


def error_shares(chunks: npt.ArrayLike, reference: npt.ArrayLike) -> Array:
    """What each observation adds to :func:`relative_error`: [n] float64 for [n, ...].

    Raises:
        ValueError: different shapes, or a reference that is zero everywhere.
    """
    ours, theirs = np.asarray(chunks, np.float64), np.asarray(reference, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"chunks have shape {ours.shape}, the reference {theirs.shape}")
    energy = float(np.sum(theirs**2))
    if energy == 0.0:
        raise ValueError("the reference chunks are zero everywhere: no relative error exists")
    squares = (ours - theirs) ** 2
    return squares.reshape(len(squares), -1).sum(axis=1) / energy
