"""Where a quantized policy errs, and what its integers had to hold: one look inside every site.

For observation i and its noise the full-precision policy runs once and the quantized one once, with
the same noise.  At every site and denoising step, with x the input, y the output in full precision
and ŷ the output inside the quantized policy, summed over observations and calls:

    error        Σ ‖ŷ - y‖² / Σ ‖y‖²         all that has gone wrong up to here
    local_error  Σ ‖Q(x) - y‖² / Σ ‖y‖²      what this site adds: Q on full precision's own input

and of the input before the transform (x) and after it (x' = x T) the largest magnitude and the root
mean square.  Their ratio is what a uniform 4-bit grid cannot hold: 15 levels that have to reach the
largest value leave none for the typical one when the ratio is large.  ``limit`` is the largest
magnitude a static scale represents; beyond it values are clipped.

``error`` is taken on at most ``ROWS`` evenly spaced rows of each call, so that a full-size policy's
outputs need not be kept; everything else sees every row.  Hooks watch the two networks from
outside: what is measured is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.evaluation.openloop import (
    draw_noises,
    offers_normalized,
    relative_error,
    sample_chunks,
)
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite, linears_of, sites_of
from omega_qvla.policies.slots import LinearSlot

ROWS = 64
"""Rows of a site's output kept per call, to compare the two policies with each other."""
BINS = 256
"""Most bins of a channel profile; a bin shows the largest of its channels."""
PROFILES_PER_COMPONENT = 2
"""Sites per component whose channels are shown: those with the worst outliers."""
_DIGITS = 5

Progress = Callable[[int, int], None]


class _IntegerSite(Protocol):
    """What a quantized site's module tells about itself (``QuantizedLinear``, its simulation)."""

    activation_bits: int

    def __call__(self, x: Tensor) -> Tensor: ...
    def transform_input(self, rows: Tensor) -> Tensor: ...
    def input_scale(self, transformed: Tensor) -> Tensor: ...


@dataclass
class _Range:
    """Largest magnitude and mean square of what was seen."""

    absmax: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, rows: Tensor) -> None:
        self.absmax = max(self.absmax, float(rows.abs().max()))
        self.squares += float(rows.double().square().sum())
        self.count += rows.numel()

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / max(self.count, 1))


@dataclass
class _Step:
    """Sums over observations and calls of one site at one denoising step."""

    time: float | None
    energy: float = 0.0
    local: float = 0.0
    kept_energy: float = 0.0
    error: float = 0.0
    before: _Range = field(default_factory=_Range)
    after: _Range = field(default_factory=_Range)
    limit: float | None = None


class _SiteProbe:
    """Everything known of one site so far."""

    def __init__(self, site: QuantizationSite, linears: Sequence[nn.Linear], integer: Any) -> None:
        self.site = site
        self.linears = linears
        self.integer: _IntegerSite = integer
        self.steps: dict[int, _Step] = {}
        self.channels: list[Tensor | None] = [None, None]
        self._parts: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {}
        self._calls: dict[int, int] = {}

    def begin(self) -> None:
        """A new observation."""
        self._parts.clear()
        self._kept.clear()
        self._calls.clear()

    def see_linear(self, number: int, x: Tensor, y: Tensor, clock: FlowClock) -> None:
        """One linear of the full-precision policy; the site is complete when all have run."""
        self._parts[number] = y.detach().flatten(0, -2)
        if len(self._parts) == len(self.linears):
            parts = [self._parts.pop(index) for index in range(len(self.linears))]
            self._see_output(x, torch.cat(parts, dim=-1).to(torch.float32), clock)

    def see_quantized(self, y: Tensor, clock: FlowClock) -> None:
        """The output of the same call inside the quantized policy."""
        step, _ = self._step(clock)
        number = self._calls.get(step, 0)
        self._calls[step] = number + 1
        kept = self._kept.get(step, [])
        rows = _thin(y.detach().flatten(0, -2).to(torch.float32))
        if number >= len(kept) or kept[number].shape != rows.shape:
            raise PolicyError(
                f"{self.site.name!r} ran differently in the quantized policy than in full "
                f"precision (call {number} of denoising step {step}): they cannot be compared"
            )
        sums = self.steps[step]
        sums.error += _squares(rows - kept[number])
        sums.kept_energy += _squares(kept[number])

    def _see_output(self, x: Tensor, y: Tensor, clock: FlowClock) -> None:
        step, sums = self._step(clock)
        rows = x.detach().flatten(0, -2).to(torch.float32)
        transformed = self.integer.transform_input(rows)
        sums.before.add(rows)
        sums.after.add(transformed)
        for place, seen in enumerate((rows, transformed)):
            largest, known = seen.abs().amax(dim=0), self.channels[place]
            self.channels[place] = largest if known is None else torch.maximum(known, largest)
        sums.energy += _squares(y)
        sums.local += _squares(self.integer(rows) - y)
        scale = self.integer.input_scale(transformed)
        if scale.numel() == 1 and self.site.per_step:
            sums.limit = float(scale) * (2 ** (self.integer.activation_bits - 1) - 1)
        self._kept.setdefault(step, []).append(_thin(y))

    def _step(self, clock: FlowClock) -> tuple[int, _Step]:
        index = clock.index if self.site.per_step and clock.index is not None else 0
        time = clock.time if self.site.per_step else None
        return index, self.steps.setdefault(index, _Step(time))

    @property
    def outlierness(self) -> float:
        """Largest over root mean square of the untransformed input, the worst step's."""
        ranges = [step.before for step in self.steps.values() if step.before.rms > 0]
        return max((seen.absmax / seen.rms for seen in ranges), default=0.0)

    def dump(self) -> dict[str, Any]:
        """The site's entry in the document."""
        steps = [self.steps[index] for index in sorted(self.steps)]
        limits = [step.limit for step in steps]
        return {
            "name": self.site.name,
            "component": self.site.component,
            "per_step": self.site.per_step,
            "in_features": self.linears[0].in_features,
            "out_features": sum(linear.out_features for linear in self.linears),
            "times": [step.time for step in steps] if self.site.per_step else None,
            "error": [_ratio(step.error, step.kept_energy) for step in steps],
            "local_error": [_ratio(step.local, step.energy) for step in steps],
            "absmax": [_round(step.before.absmax) for step in steps],
            "rms": [_round(step.before.rms) for step in steps],
            "transformed_absmax": [_round(step.after.absmax) for step in steps],
            "transformed_rms": [_round(step.after.rms) for step in steps],
            "limit": None if None in limits else [_round(cast(float, limit)) for limit in limits],
        }

    def profile(self) -> dict[str, Any]:
        """Largest magnitude by channel, before and after the transform."""
        before, after = (cast(Tensor, channels) for channels in self.channels)
        return {
            "site": self.site.name,
            "component": self.site.component,
            "channels": before.numel(),
            "transformed_channels": after.numel(),
            "before": channel_profile(before),
            "after": channel_profile(after),
        }


def diagnose(
    policy: Any,
    quantized: Any,
    observations: Sequence[Any],
    *,
    seed: int = 0,
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Compare a quantized policy with full precision, site by site.

    Args:
        policy: full precision, in memory; not modified.
        quantized: what ``quantize`` made of it (integers or a simulation), or ``load`` read.
        observations: held-out observations.
        seed: draws their noises, as in :class:`~omega_qvla.evaluation.sweep.OpenLoop`.
        progress: called with (observations done, all).

    Returns:
        ``observations``, ``action_error``, ``noise_floor``, ``sites`` and ``profiles`` as
        docs/json.md describes them.

    Raises:
        ObservationError: no observations.
        PolicyError: the policy is streamed, the two are not the same network, or nothing in it is
            quantized.
        NonFiniteError: an action chunk is not finite.
    """
    if not observations:
        raise ObservationError("diagnostics need at least one held-out observation")
    if policy.store is not None:
        raise PolicyError("diagnostics run the full-precision policy: load it with load_policy")
    probes = _probes(policy, quantized.policy)
    noises = draw_noises(policy, len(observations), seed)
    normalized = offers_normalized(policy) and offers_normalized(quantized)
    chunks, references = [], []
    for number, observation in enumerate(observations):
        progress(number, len(observations))
        one = ([observation], noises[number : number + 1])
        for probe in probes:
            probe.begin()
        with _watched_full(probes, policy.clock, quantized.policy.clock):
            references.append(sample_chunks(policy, *one, normalized=normalized))
        with _watched_quantized(probes, quantized.policy.clock):
            chunks.append(sample_chunks(quantized, *one, normalized=normalized))
    progress(len(observations), len(observations))
    others = draw_noises(policy, len(observations), seed + 1)
    spread = sample_chunks(policy, observations, others, normalized=normalized)
    reached = [probe for probe in probes if probe.steps]
    return {
        "observations": len(observations),
        "action_error": relative_error(chunks, references),
        "noise_floor": relative_error(spread, [chunk[0] for chunk in references]),
        "sites": [probe.dump() for probe in reached],
        "profiles": [probe.profile() for probe in _most_outlying(reached)],
    }


def channel_profile(largest: Tensor, bins: int = BINS) -> list[float]:
    """Largest magnitudes by channel [K] → at most ``bins`` of them, each the largest of its bin.

    Neighbouring channels share a bin, all bins but the last are equally wide, and no outlier is
    averaged away.

    Raises:
        ValueError: no channels, or fewer than one bin.
    """
    if largest.ndim != 1 or largest.numel() == 0 or bins < 1:
        raise ValueError(f"cannot put channels {list(largest.shape)} into {bins} bins")
    width = -(-largest.numel() // bins)
    return [_round(float(part.max())) for part in largest.split(width)]


def _probes(policy: Any, quantized: Any) -> list[_SiteProbe]:
    """One per quantized site; those of a user's module are made when it is quantized."""
    probes: list[_SiteProbe] = []
    for site in sites_of(quantized):
        try:
            integer = quantized.module.get_submodule(site.linears[0])
        except AttributeError as error:
            raise PolicyError(f"the quantized policy has no {site.linears[0]!r}") from error
        if isinstance(integer, LinearSlot):
            integer = integer.linear
        if not isinstance(integer, nn.Linear):
            probes.append(_SiteProbe(site, linears_of(policy.module, site), integer))
    if not probes:
        raise PolicyError("nothing in this policy is quantized: there is nothing to diagnose")
    return probes


def _most_outlying(probes: Sequence[_SiteProbe]) -> list[_SiteProbe]:
    """The worst few of every component, in execution order."""
    chosen: set[str] = set()
    for component in dict.fromkeys(probe.site.component for probe in probes):
        mine = [probe for probe in probes if probe.site.component == component]
        mine.sort(key=lambda probe: -probe.outlierness)
        chosen |= {probe.site.name for probe in mine[:PROFILES_PER_COMPONENT]}
    return [probe for probe in probes if probe.site.name in chosen]


@contextmanager
def _watched_full(
    probes: Sequence[_SiteProbe], clock: FlowClock, other: FlowClock
) -> Iterator[None]:
    """Hooks on every linear of every site; ``other`` follows ``clock`` while a site is tried."""

    def watch(probe: _SiteProbe, number: int) -> Callable[..., None]:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if clock.index is None or clock.time is None:
                probe.see_linear(number, inputs[0], y, clock)
                return
            with other.step(clock.index, clock.time):
                probe.see_linear(number, inputs[0], y, clock)

        return see

    pairs = [(probe, *item) for probe in probes for item in enumerate(probe.linears)]
    with _hooks([(linear, watch(probe, number)) for probe, number, linear in pairs]):
        yield


@contextmanager
def _watched_quantized(probes: Sequence[_SiteProbe], clock: FlowClock) -> Iterator[None]:
    def watch(probe: _SiteProbe) -> Callable[..., None]:
        return lambda _module, _inputs, y: probe.see_quantized(y, clock)

    with _hooks([(cast(nn.Module, probe.integer), watch(probe)) for probe in probes]):
        yield


@contextmanager
def _hooks(wanted: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _thin(rows: Tensor) -> Tensor:
    """At most ``ROWS`` evenly spaced rows, copied."""
    if rows.shape[0] <= ROWS:
        return rows.clone()
    return rows[torch.linspace(0, rows.shape[0] - 1, ROWS).round().long()]


def _squares(values: Tensor) -> float:
    return float(values.double().square().sum())


def _ratio(part: float, whole: float) -> float | None:
    """None where the output is zero everywhere: no relative error exists."""
    return _round(part / whole) if whole > 0 else None


def _round(value: float) -> float:
    """A few significant digits: what a figure can show, at a fraction of the file's size."""
    return float(f"{value:.{_DIGITS}g}")
