"""Quantize a whole policy: the loop over stages and sites.

Calibration walks the policy's stages in execution order and keeps, per observation, only the state
between two stages.  With ``cascade`` each site is measured after everything before it has been
quantized and replaced by its simulation, so that a later site's scales and GPTQ's Hessian are those
it will really see, and its rounding can compensate the errors that already happened.  Without it
(the baselines as published) all statistics come from the full-precision policy.

Every finished site goes into the journal before the next one starts.

A policy with a weight store (``checkpoints/weight_store.py``) is quantized in a fraction of its
size: a stage's parameters are in memory while the stage is at work; finished sites are on disk, in
the journal, from where they are read again one by one.

On a GPU it is the same loop.  A stage's parameters and what is computed of them (statistics,
factors, integers) are there while the stage is at work; what a site has become is brought back
before anything keeps it (``policies/placement.py``).  Observations are encoded, and noise and
sampled rows drawn, on the CPU; so is the table of the adaptive norms computed, a few hundred rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain
from typing import overload

import torch
from torch import Tensor

from omega_qvla.calibration.capture import SiteStatistics, capture
from omega_qvla.calibration.observations import as_observations
from omega_qvla.checkpoints.weight_store import named_values, weights_on
from omega_qvla.devices import CPU, Gpu, check_memory, computing_on
from omega_qvla.errors import NonFiniteError, PolicyError
from omega_qvla.policies.base import (
    HasEmbedding,
    Observation,
    Policy,
    QuantizationSite,
    Stage,
    State,
    linears_of,
    sites_of,
)
from omega_qvla.policies.layers.step_table import HasStepTable, StepTable
from omega_qvla.policies.native import NativePolicy
from omega_qvla.policies.placement import moved, on_device
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.attention import (
    AttentionFactors,
    match_attention,
    require_head_attention,
    scale_attention,
)
from omega_qvla.quantization.embedding import QuantizedRows, quantize_rows
from omega_qvla.quantization.gpu_memory import gpu_bytes
from omega_qvla.quantization.journal import ON_CPU, Journal
from omega_qvla.quantization.rehearsal import with_slots
from omega_qvla.quantization.simulation import (
    SimulatedEmbedding,
    SimulatedLinear,
    install,
    install_site,
)
from omega_qvla.quantization.site import QuantizedSite, needs_statistics, quantize_site
from omega_qvla.recipe import Recipe

Progress = Callable[[int, int, str], None]
"""(sites done, sites in all, what is being done now)."""


_TYPICAL_ROWS = 4096
"""Calibration rows assumed where only the proportions of the work matter."""


@dataclass(frozen=True)
class Quantization:
    """The outcome of quantizing a policy.

    Attributes:
        recipe: what was done.
        sites: quantized sites in execution order.
        embedding: token embedding as integers, or None where it stays as it is.
        step_table: adaptive-norm modulation over flow time, or None where the dense layers stay.
        calibration: fingerprint of the observations that were used.
        observations: how many there were.
        attention: what the action head's 16-bit attention is multiplied with, where a recipe asks.
        warnings: in what the observations are unlike what the policy was trained on.
    """

    recipe: Recipe
    sites: Sequence[QuantizedSite]
    embedding: QuantizedRows | None
    step_table: StepTable | None
    calibration: str
    observations: int
    attention: Sequence[AttentionFactors] = ()
    warnings: Sequence[str] = ()


def quantize_policy(
    policy: Policy,
    observations: Iterable[Observation],
    recipe: Recipe,
    *,
    journal: Callable[[dict[str, str]], Journal] | None = None,
    progress: Progress = lambda _done, _total, _what: None,
    gpu: Gpu | None = None,
) -> Quantization:
    """Quantize every site that the recipe covers.

    Args:
        policy: full precision; it is not modified.
        observations: calibration data; at most ``recipe.observations`` of them, evenly spread.
        recipe: the method.
        journal: opens the journal for a header (see ``journal_header``); None keeps none.
        progress: called before each site.
        gpu: computes instead of the CPU; the outcome is on the CPU all the same.

    Raises:
        ObservationError: there are no observations, or one does not fit the policy.
        NonFiniteError: NaN or Inf in a weight or an activation.
        PolicyError: the recipe covers no site of this policy, or a site was never reached; or the
            policy is streamed and the recipe needs all of it at once; or it is not on the CPU, or a
            module of the user's own is to compute on a GPU.
        ResourceError: the GPU has too little memory.
        ResumeError: the journal belongs to other inputs, or was begun on another device.
    """
    given = as_observations(observations)
    numbers = given.spread_indices(recipe.observations)
    used = given.spread(recipe.observations)
    covered = planned_sites(policy, recipe)
    if not covered:
        raise PolicyError(
            f"recipe {recipe.name!r} covers no part of this {policy.family} policy; its sites are "
            f"in {sorted({site.component for site in sites_of(policy)})}"
        )
    if recipe.match_attention:
        require_head_attention(policy)
    if policy.store is not None:
        _require_streamable(recipe)
    _require_placeable(policy, recipe, gpu)
    # Once through all weights, since reading them takes long: a journal wants them hashed as well.
    values = _finite_values(policy)
    weights = "" if journal is None else _fingerprint(values)
    deque(values, maxlen=0)
    calibration = used.fingerprint
    # Before the journal is opened: observations that do not fit leave nothing behind.
    states = [
        policy.initial_state(item, torch.Generator().manual_seed(recipe.seed + i))
        for i, item in enumerate(used)
    ]
    opened = (
        None
        if journal is None
        else journal(journal_header(policy, weights, calibration, recipe, gpu))
    )
    with computing_on(gpu, f"quantizing with recipe {recipe.name!r}") as device:
        working = with_slots(policy, covered) if isinstance(policy, TorchPolicy) else policy.clone()
        embedding = _quantize_embedding(working, recipe, device)
        work = _Work(working, recipe, covered, numbers, opened, progress, device)
        stages = [on_device(stage, device) for stage in working.stages()]
        for number, stage in enumerate(stages):
            with weights_on(working.module, working.store, stage.reads, device):
                after = work.quantize_stage(stage, states)
                if number + 1 < len(stages):
                    states = after or _advance(stage, states)
            work.leave_stage()
        _require_all(covered, work.done)
        quantization = Quantization(
            recipe=recipe,
            sites=work.finished,
            embedding=embedding,
            step_table=_tabulate(policy, recipe),
            calibration=calibration,
            observations=len(used),
        )
        if not recipe.match_attention:
            return quantization
        simulated = simulate(policy, quantization)
        factors = match_attention(policy.clone(), simulated, used, recipe.seed, device)
        return replace(quantization, attention=factors)


def planned_sites(policy: Policy, recipe: Recipe) -> list[QuantizationSite]:
    """The sites that a recipe quantizes, in execution order.

    Raises:
        RecipeError: the recipe says something of sites that this policy does not have.
    """
    sites = sites_of(policy)
    recipe.require_known(sites)
    return [site for site in sites if recipe.scheme_of(site) is not None]


def simulate(policy: Policy, quantization: Quantization) -> Policy:
    """A copy of ``policy`` that computes in floating point with the dequantized values."""
    target = policy.clone()
    for quantized in quantization.sites:
        _install_simulation(target, quantized)
    if quantization.embedding is not None:
        rows = quantization.embedding
        install(target.module, [rows.path], SimulatedEmbedding(rows))
    scale_attention(target, quantization.attention)
    return target


def _install_simulation(policy: Policy, quantized: QuantizedSite) -> SimulatedLinear:
    simulated = SimulatedLinear(quantized, policy.clock)
    install_site(policy, quantized.site.linears, simulated)
    return simulated


def journal_header(
    policy: Policy, weights: str, calibration: str, recipe: Recipe, gpu: Gpu | None = None
) -> dict[str, str]:
    """Everything that the bytes of the result depend on; ``weights`` is their fingerprint."""
    structure, files = policy.describe()
    description = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for name, content in sorted(files.items()):
        description.update(f"{name}[{len(content)}]".encode() + content)
    sites = [[site.name, site.component, *site.linears] for site in sites_of(policy)]
    return {
        "recipe": recipe.content_hash,
        "policy": description.hexdigest(),
        "sites": hashlib.sha256(json.dumps(sites).encode()).hexdigest(),
        "weights": weights,
        "calibration": calibration,
        "library": version("omega-qvla"),
        "torch": torch.__version__,
        "device": ON_CPU if gpu is None else gpu.arithmetic,
        # Parts of a sum end where one thread's work ends and the next one's begins.
        "threads": str(torch.get_num_threads()),
    }


def weights_fingerprint(policy: Policy) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers."""
    return _fingerprint(named_values(policy.module, policy.store))


def _fingerprint(values: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in values:
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def work_shares(policy: Policy, recipe: Recipe) -> list[float]:
    """The part of all work that is done before each covered site, and 1 at the end.

    For estimates of the time left: the widest site of a policy takes a thousand times as long as
    the narrowest.  Per site R K² for the second moment, 4/3 K³ for the factor and its inverse,
    3 N K² for propagation and proxy loss (docs/design-notes/2026-11-full-size.md).
    """
    done = [0.0]
    for site in planned_sites(policy, recipe):
        linears = linears_of(policy.module, site)
        inputs, outputs = linears[0].in_features, sum(linear.out_features for linear in linears)
        done.append(done[-1] + inputs**2 * (_TYPICAL_ROWS + 4 / 3 * inputs + 3 * outputs))
    return [work / done[-1] for work in done]


def _advance(stage: Stage, states: Sequence[State]) -> list[State]:
    with torch.no_grad():
        return [stage.run(state) for state in states]


def _require_all(planned: Sequence[QuantizationSite], done: Sequence[QuantizationSite]) -> None:
    missing = [site.name for site in planned if site not in done]
    if missing:
        raise PolicyError(
            f"{len(missing)} of {len(planned)} sites were not quantized: {', '.join(missing[:3])}"
        )


def _require_streamable(recipe: Recipe) -> None:
    reason = None
    if recipe.cascade:
        reason = "calibrates later layers on quantized earlier ones (cascade)"
    if not recipe.realizable:
        reason = "is a simulation in floating point"
    if recipe.match_attention:
        reason = "runs full precision beside the quantized policy (match_attention)"
    if reason is not None:
        raise PolicyError(
            f"recipe {recipe.name!r} {reason}, which needs the whole policy in memory; load it "
            "with load_policy instead of stream_policy"
        )


def _require_placeable(policy: Policy, recipe: Recipe, gpu: Gpu | None) -> None:
    """Before anything is moved: what cannot be, or would not fit."""
    if gpu is not None and not isinstance(policy, NativePolicy):
        raise PolicyError(
            f"device {gpu.device!r} is for the policies of this project; a module of your own "
            "makes its tensors where it likes, so it is quantized on 'cpu' only"
        )
    for name, tensor in chain(policy.module.named_parameters(), policy.module.named_buffers()):
        if tensor.device.type not in (CPU.type, "meta"):
            raise PolicyError(
                f"{name} is on {str(tensor.device)!r}: a policy to be quantized lies on the CPU "
                "and is moved layer by layer as device= says; bring it back with module.to('cpu')"
            )
    if gpu is not None:
        needed = gpu_bytes(policy, recipe)
        check_memory(gpu, needed, f"quantizing this {policy.family} policy with {recipe.name!r}")


def _finite_values(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """All weights, checked before anything runs: a bad one would show first far away from it."""
    stored = set(policy.module.state_dict())
    buffers = {path for path, _ in policy.module.named_buffers()}
    for path, value in named_values(policy.module, policy.store):
        # A buffer that is not persistent may hold what it likes: a mask of -Inf, for example.
        if path in stored and not bool(torch.isfinite(value).all()):
            name, _, kind = path.rpartition(".")
            remedy = "the checkpoint is damaged"
            if path in buffers:
                remedy = "a mask of constants is registered with persistent=False; if it is none, "
                remedy += "the checkpoint is damaged"
            raise NonFiniteError(f"{kind} of {name!r} has NaN or Inf; {remedy}")
        yield path, value


class _Work:
    """The sites done so far, and the steps that do one more."""

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        covered: Sequence[QuantizationSite],
        numbers: Sequence[int],
        journal: Journal | None,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.policy, self.recipe, self.journal, self.progress = policy, recipe, journal, progress
        self.numbers, self.device = numbers, device
        self.index = {site.name: i for i, site in enumerate(covered)}
        self.done: list[QuantizationSite] = []
        self.finished: Sequence[QuantizedSite] = []
        self._installed: list[SimulatedLinear] = []
        if journal is not None and policy.store is not None:
            self.finished = _StoredSites(journal, self.done)

    def quantize_stage(self, stage: Stage, states: Sequence[State]) -> list[State] | None:
        """Quantize the covered sites of one stage.

        Returns:
            The states after the stage, if it ran with the weights that later stages are to see.
        """
        sites = [site for site in stage.sites if site.name in self.index]
        if self.recipe.cascade:
            for site in sites:
                quantized = self._one(site, lambda s: self._measure(stage, states, [s])[0][s.name])
                self._install(quantized)
            return None
        missing = [site for site in sites if self._stored(site) is None]
        measured, after = self._measure(stage, states, missing)
        for site in sites:
            self._one(site, lambda s: measured.pop(s.name))
        return after

    def leave_stage(self) -> None:
        """Bring to the CPU what was installed in a stage that is done."""
        for simulated in self._installed:
            simulated.to(CPU)
        self._installed.clear()

    def _one(
        self,
        site: QuantizationSite,
        measure: Callable[[QuantizationSite], SiteStatistics | None],
    ) -> QuantizedSite:
        self.progress(len(self.done), len(self.index), site.name)
        quantized = self._stored(site)
        if quantized is None:
            scheme = self.recipe.scheme_of(site)
            assert scheme is not None
            linears = linears_of(self.policy.module, site)
            quantized = moved(quantize_site(site, linears, scheme, measure(site)), CPU)
            if self.journal is not None:
                self.journal.store(self.index[site.name], quantized)
        self.done.append(site)
        if isinstance(self.finished, list):
            self.finished.append(quantized)
        return quantized

    def _stored(self, site: QuantizationSite) -> QuantizedSite | None:
        return None if self.journal is None else self.journal.find(self.index[site.name], site)

    def _measure(
        self, stage: Stage, states: Sequence[State], sites: Sequence[QuantizationSite]
    ) -> tuple[dict[str, SiteStatistics | None], list[State] | None]:
        wanted = []
        for site in sites:
            scheme = self.recipe.scheme_of(site)
            if scheme is not None and needs_statistics(scheme):
                wanted.append(site)
        nothing: dict[str, SiteStatistics | None] = {site.name: None for site in sites}
        if not wanted:
            return nothing, None
        found, after = capture(
            stage,
            states,
            wanted,
            self.policy.module,
            self.policy.clock,
            lambda site: self.recipe.seed + self.index[site.name],
            self.numbers,
            self._equal_tokens,
        )
        return nothing | found, after

    def _equal_tokens(self, site: QuantizationSite) -> bool:
        scheme = self.recipe.scheme_of(site)
        return scheme is not None and scheme.tokens == "equal"

    def _install(self, quantized: QuantizedSite) -> None:
        there = moved(quantized, self.device)
        self._installed.append(_install_simulation(self.policy, there))


class _StoredSites(Sequence[QuantizedSite]):
    """Finished sites as the journal has them, read when they are asked for."""

    def __init__(self, journal: Journal, sites: Sequence[QuantizationSite]) -> None:
        self._journal, self._sites = journal, sites

    def __len__(self) -> int:
        return len(self._sites)

    @overload
    def __getitem__(self, index: int) -> QuantizedSite: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[QuantizedSite]: ...
    def __getitem__(self, index: int | slice) -> QuantizedSite | Sequence[QuantizedSite]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._journal.load(number, self._sites[number])

    def __iter__(self) -> Iterator[QuantizedSite]:
        # Not by the protocol of __getitem__, which takes any IndexError for the end.
        return (self[i] for i in range(len(self)))


def _quantize_embedding(
    policy: Policy, recipe: Recipe, device: torch.device
) -> QuantizedRows | None:
    bits = recipe.embedding_bits
    if bits == 16 or not isinstance(policy, HasEmbedding):
        return None
    path = policy.embedding_path
    with weights_on(policy.module, policy.store, [path], device):
        table = policy.module.get_parameter(f"{path}.weight").detach()
        rows = moved(quantize_rows(path, table, bits), CPU)
    install(policy.module, [path], SimulatedEmbedding(rows))
    return rows


def _tabulate(policy: Policy, recipe: Recipe) -> StepTable | None:
    if recipe.adaptive_norm != "table" or not isinstance(policy, HasStepTable):
        return None
    return policy.tabulate_modulation(recipe.table_step_counts)
