"""Streamed statistics of what a site reads, per denoising step.

Quantization needs three things of a site's input x [rows, K]:

* the second moment Σ xᵀx over all rows, which is GPTQ's Hessian and, on its diagonal, the
  channels' mean squares that smoothing uses; beside it the channels' largest magnitudes;
* a bounded, uniform sample of rows per denoising step, on which scales are searched and
  magnitude quantiles read after the transform is known;
* whether anything was not finite, and if so exactly where.

Rows are folded in as they appear: the cost is K² plus ``SAMPLE_ROWS`` rows per step, whatever the
number of observations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.base import QuantizationSite, Stage, State, linears_of
from omega_qvla.policies.slots import same_tensor, version_of

SAMPLE_ROWS = 1024
"""Rows kept per (site, step)."""
_MORE_ROWS = SAMPLE_ROWS // 4
"""Rows that may lie beside a full sample until it is made one again."""

_FLOAT64_WIDTH = 4096
"""Up to this width second moments are summed in float64; wider ones would take gigabytes."""


def _moment_dtype(width: int) -> torch.dtype:
    return torch.float64 if width <= _FLOAT64_WIDTH else torch.float32


def moment_bytes(width: int) -> int:
    """Bytes of the second moment of a site with this many input channels."""
    return _moment_dtype(width).itemsize * width**2


def sample_bytes(width: int) -> int:
    """Bytes of a full row sample of such a site at one denoising step."""
    return torch.float32.itemsize * (SAMPLE_ROWS + _MORE_ROWS) * width


class RowSample:
    """A uniform sample of a stream of rows (reservoir sampling in blocks).

    Every row draws a random key; the rows with the ``SAMPLE_ROWS`` smallest keys are kept, in the
    order of the stream, so any order and any block size gives a uniform sample.  Rows stay on the
    device that computed them; keys are drawn and sorted on the CPU, so that the same rows are kept
    on every device.

    A row whose key is not among the smallest so far never will be, and is not copied.  What comes
    in is kept in pieces that are put together now and then, or when someone looks: most blocks cost
    their keys and a few rows.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._held = 0
        self._largest = 1.0  # keys are below it

    def add(self, rows: Tensor) -> None:
        """Offer rows [R, K] float32."""
        keys = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if self._largest < 1.0:
            chosen = (keys < self._largest).nonzero().squeeze(1)
            rows, keys = rows[chosen.to(rows.device)], keys[chosen]
        else:
            rows = rows.clone()
        self._rows.append(rows)
        self._keys.append(keys)
        self._held += len(keys)
        if self._held > SAMPLE_ROWS + _MORE_ROWS:
            self._put_together()

    @property
    def rows(self) -> Tensor | None:
        """The sample [at most SAMPLE_ROWS, K]; None where nothing was offered."""
        if not self._rows:
            return None
        self._put_together()
        return self._rows[0]

    def shift(self, offset: Tensor) -> None:
        """Subtract an offset [K] from every row."""
        self._rows = [rows - offset for rows in self._rows]

    def _put_together(self) -> None:
        """One piece, and no more rows than a sample has."""
        if len(self._rows) == 1 and self._held <= SAMPLE_ROWS:
            return
        rows, keys = torch.cat(self._rows), torch.cat(self._keys)
        if len(keys) > SAMPLE_ROWS:
            keep = keys.argsort()[:SAMPLE_ROWS].sort().values
            rows, keys = rows[keep.to(rows.device)], keys[keep]
        if len(keys) == SAMPLE_ROWS:
            self._largest = float(keys.max())
        self._rows, self._keys, self._held = [rows], [keys], len(keys)


@dataclass
class SiteStatistics:
    """What was seen at the input of one site.

    Attributes:
        site: the site.
        width: input channels K.
        count: rows seen.
        second_moment: Σ xᵀx, [K, K].
        sums: Σ x by denoising step, [K] float64 each.
        counts: rows seen by denoising step.
        maxima: largest magnitude of each channel, [K] float32.
        samples: row samples by denoising step; sites that run once use step 0.
        times: flow time of each step seen.
        numbers: the observations seen, by the caller's numbers.
        deviation: [K] how far channels may move beyond what was seen (``expect``), or None.
        device: where the site computes: moments, maxima and row samples are there.
        equal_tokens: every row is divided by its root mean square first, so that all count the
            same; ``centre`` is for others.
    """

    site: QuantizationSite
    width: int
    generator: torch.Generator
    device: torch.device | str = "cpu"
    equal_tokens: bool = False
    count: int = 0
    second_moment: Tensor = field(init=False)
    maxima: Tensor = field(init=False)
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    samples: dict[int, RowSample] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)
    deviation: Tensor | None = None

    def __post_init__(self) -> None:
        square = (self.width, self.width)
        dtype = _moment_dtype(self.width)
        self.second_moment = torch.zeros(square, dtype=dtype, device=self.device)
        self.maxima = torch.zeros(self.width, device=self.device)

    def update(self, x: Tensor, clock: FlowClock, observation: int) -> None:
        """Fold in one call's input [..., K].

        Raises:
            NonFiniteError: x has NaN or Inf.
            PolicyError: a per-step site ran outside any denoising step.
        """
        rows = x.detach().reshape(-1, self.width).to(torch.float32)
        step, time = self._step(clock)
        total = rows.sum(dim=0, dtype=torch.float64)
        # A float64 sum of float32 numbers cannot overflow: it is finite exactly if they all are.
        if not bool(torch.isfinite(total).all()):
            where = "" if clock.index is None else f", denoising step {step}"
            raise NonFiniteError(
                f"activations entering {self.site.name!r} have NaN or Inf "
                f"(observation {observation}{where}); check the observation and the checkpoint"
            )
        if self.equal_tokens:
            size = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / self.width**0.5
            rows = rows / torch.where(size > 0, size, torch.ones_like(size))
        self.count += rows.shape[0]
        product = rows.to(self.second_moment.dtype)
        self.second_moment.addmm_(product.T, product)
        if rows.shape[0]:
            self.maxima = torch.maximum(self.maxima, rows.abs().amax(dim=0))
        self.times[step] = time
        self.numbers.add(observation)
        self.sums[step] = total + self.sums.get(step, 0.0)
        self.counts[step] = self.counts.get(step, 0) + rows.shape[0]
        if step not in self.samples:
            self.samples[step] = RowSample(self.generator)
        self.samples[step].add(rows)

    def _step(self, clock: FlowClock) -> tuple[int, float]:
        if not self.site.per_step:
            return 0, 1.0
        if clock.index is None or clock.time is None:
            raise PolicyError(
                f"{self.site.name!r} belongs to the action head but ran outside any denoising "
                "step; enter `with clock.step(i, t):` around each step, or give step_module"
            )
        return clock.index, clock.time

    def centre(self) -> dict[int, Tensor]:
        """Take its mean away from every step's inputs, as if they had been seen without it.

        Returns:
            The means by step, [K] float32.
        """
        means: dict[int, Tensor] = {}
        for step, total in self.sums.items():
            mean = total / max(self.counts[step], 1)
            means[step] = mean.to(torch.float32)
            moment = mean.to(self.second_moment.dtype)
            self.second_moment.addr_(moment, moment, alpha=-float(self.counts[step]))
            self.samples[step].shift(means[step])
        # A variance is not negative, whatever the difference of two sums came to.
        self.second_moment.diagonal().clamp_min_(0.0)
        self.maxima = torch.stack([self.rows(step).abs().amax(dim=0) for step in means]).amax(dim=0)
        return means

    def expect(self, deviation: Tensor) -> None:
        """Reckon with channels that move by this beyond what was seen, each by itself.

        Second moment and rows are from then on as if every row had such a deviation, normal with
        these standard deviations [K]; rows get the same one whenever they are asked for.
        """
        self.deviation = deviation.to(torch.float32)
        variance = deviation.to(self.second_moment.dtype).square()
        self.second_moment.diagonal().add_(variance, alpha=self.count)

    @property
    def observations(self) -> int:
        """How many observations were seen."""
        return len(self.numbers)

    @property
    def rms(self) -> Tensor:
        """Root mean square of each input channel, [K] float32."""
        return (self.second_moment.diagonal() / max(self.count, 1)).sqrt().to(torch.float32)

    def take_moment(self) -> Tensor:
        """The mean of xᵀx, [K, K]; it is given away, not copied: a gigabyte at K = 16384."""
        moment = self.second_moment.div_(max(self.count, 1))
        self.second_moment = moment.new_empty((0, 0))
        return moment

    @property
    def steps(self) -> list[int]:
        """Denoising steps seen, ascending."""
        return sorted(self.samples)

    def rows(self, step: int) -> Tensor:
        """The row sample of one step, [R, K] float32."""
        rows = self.samples[step].rows
        if rows is None:
            raise PolicyError(f"{self.site.name!r} saw no rows at step {step}")
        if self.deviation is None:
            return rows
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(step))
        return rows + noise.to(rows.device) * self.deviation


class _InputsOfSite:
    """Which inputs of a site's linears are another one's, seen already.

    They are called one after the other with one tensor.  In a user's module they may also be called
    with several, all of which count.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._version: int | None = None
        self._linears: set[int] = set()

    def is_new(self, number: int, x: Tensor) -> bool:
        """Whether this call of linear ``number`` begins another round of calls."""
        known = self._seen
        if known is not None and number not in self._linears:
            same = known is x or same_tensor(known, self._version, x)
            if same and self._version == version_of(x):
                self._linears.add(number)
                return False
        self._seen, self._version, self._linears = x, version_of(x), {number}
        return True


def capture(
    stage: Stage,
    states: Sequence[State],
    sites: Sequence[QuantizationSite],
    module: nn.Module,
    clock: FlowClock,
    seed: Callable[[QuantizationSite], int],
    numbers: Sequence[int] | None = None,
    equal_tokens: Callable[[QuantizationSite], bool] = lambda _site: False,
) -> tuple[dict[str, SiteStatistics], list[State]]:
    """Run a stage on every state; return what its sites read, and the states after it.

    Args:
        stage: the stage the sites belong to.
        states: one state per observation, as the previous stage left it.
        sites: the sites to watch.
        module: the policy's module, in which the sites' linears are looked up.
        clock: the policy's clock.
        seed: seeds the row sample of each site, independently of which others are watched.
        numbers: the user's number of each observation, for messages; counted from 0 when absent.
        equal_tokens: at which sites all tokens count the same (``SiteStatistics``).

    Raises:
        NonFiniteError: an activation is NaN or Inf; names site, step and observation.
        PolicyError: a site was never reached.
    """
    found: dict[str, SiteStatistics] = {}
    after: list[State] = []
    current = {"observation": 0}
    handles = []
    for site in sites:
        linears = linears_of(module, site)
        generator = torch.Generator().manual_seed(seed(site))
        device = linears[0].weight.device
        statistics = SiteStatistics(
            site, linears[0].in_features, generator, device, equal_tokens(site)
        )
        found[site.name] = statistics
        inputs_of_site = _InputsOfSite()
        for number, linear in enumerate(linears):

            def watch(
                _module: nn.Module,
                inputs: tuple[Tensor, ...],
                number: int = number,
                new: _InputsOfSite = inputs_of_site,
                watched: SiteStatistics = statistics,
            ) -> None:
                if new.is_new(number, inputs[0]):
                    watched.update(inputs[0], clock, current["observation"])

            handles.append(linear.register_forward_pre_hook(watch))
    try:
        with torch.no_grad():
            for index, state in enumerate(states):
                current["observation"] = index if numbers is None else numbers[index]
                after.append(stage.run(state))
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in found.items():
        if statistics.count == 0:
            raise PolicyError(
                f"{name!r} was never called during calibration; leave it out of the pattern, or "
                "calibrate with observations that reach it"
            )
    return found, after
