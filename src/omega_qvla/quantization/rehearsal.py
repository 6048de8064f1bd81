"""A user's module tried out before it is quantized: one sample, every linear in its slot.

The slots (``policies/slots.py``) hold the full-precision linears, so the sample must give the very
same actions as the module itself, call by call.  Whatever could not survive quantization shows here
in a second, and not after hours as wrong actions: a weight that is read directly, a forward kept
elsewhere, code that asks what type a layer is, a module without parameters, a sample that draws
numbers of its own.

The same sample tells which linears read the same tensor.  Those become one site: one transform, one
set of statistics, one quantized activation.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omega_qvla.artifact.tensors import spec_of
from omega_qvla.errors import NonFiniteError, OmegaError, PolicyError
from omega_qvla.policies.base import Observation, Policy, QuantizationSite, linears_of
from omega_qvla.policies.denoising_calls import around_method
from omega_qvla.policies.slots import InputNumbers, fill_slots, storable
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.recipe import Recipe


def with_slots(policy: TorchPolicy, sites: Sequence[QuantizationSite]) -> TorchPolicy:
    """A copy of the policy in which the linears of these sites are in slots, each by itself."""
    twin = policy.clone()
    for site in sites:
        for name, linear in zip(site.linears, linears_of(twin.module, site), strict=True):
            fill_slots(twin.module, [name], linear, twin.clock)
    return twin


@dataclass(frozen=True)
class Rehearsal:
    """A policy that can be quantized.

    Attributes:
        policy: the policy, linears that read the same tensor in one site.
        observation, noise: of the sample that was made.
        actions: what it gave.
    """

    policy: TorchPolicy
    observation: Observation
    noise: Any
    actions: Any

    def check(self, quantized: Policy) -> None:
        """Make the sample again with the quantized policy.

        Raises:
            PolicyError: it fails, or its actions have another shape or dtype.
            NonFiniteError: its actions have NaN or Inf where there was none.
        """
        with _as_drawn():
            try:
                found = quantized.sample_actions(self.observation, self.noise)
            except OmegaError:
                raise
            except Exception as error:
                raise PolicyError(
                    f"the quantized policy cannot be sampled: {_text(error)}"
                ) from error
        for before, after in zip(_tensors(self.actions), _tensors(found), strict=False):
            if before.shape != after.shape or before.dtype != after.dtype:
                raise PolicyError(
                    f"the quantized policy gives {after.dtype} {list(after.shape)} in place of "
                    f"{before.dtype} {list(before.shape)}"
                )
            if _finite(before) and not _finite(after):
                raise NonFiniteError("the actions of the quantized policy have NaN or Inf")


def rehearse(policy: TorchPolicy, observation: Observation, recipe: Recipe) -> Rehearsal:
    """Sample once with the module as it is, and once with its linears in slots.

    Raises:
        PolicyError: the two differ, or sampling fails; says where and why.
        ArtifactError: the module holds a tensor that no artifact can.
    """
    recipe.require_known(policy.sites)
    covered = [site for site in policy.sites if recipe.scheme_of(site) is not None]
    if recipe.realizable:
        _require_storable(policy, {name for site in covered for name in site.linears})
    generator = torch.Generator().manual_seed(recipe.seed)
    noise = policy.initial_state(observation, generator)["noise"]
    with _as_drawn(), _slow_attention():
        expected = _sample(policy.clone(), covered, observation, noise)
    with _as_drawn(), _slow_attention():
        try:
            found = _sample(with_slots(policy, covered), covered, observation, noise)
        except OmegaError:
            raise
        except Exception as error:
            raise PolicyError(
                f"the policy cannot be sampled once its linears are replaced: {_text(error)}; "
                "leave the linears that are handled there out of the pattern"
            ) from error
    if found.calls != expected.calls or not _equal(found.actions, expected.actions):
        with _as_drawn(), _slow_attention():
            again = _sample(policy.clone(), covered, observation, noise)
        raise PolicyError(_difference(expected, found, again))
    fused = _share_inputs(policy, covered, found.inputs, recipe)
    return Rehearsal(policy.with_sites(fused), observation, noise, expected.actions)


@dataclass
class _Sample:
    """One sample.

    Attributes:
        actions: what it gave.
        calls: the linears in the order they were called, with the sum of their inputs.
        inputs: by linear, the numbers of the tensors it read.
    """

    actions: Any
    calls: list[tuple[str, str]]
    inputs: dict[str, list[int]]


def _sample(
    policy: TorchPolicy, sites: Sequence[QuantizationSite], observation: Observation, noise: Any
) -> _Sample:
    tensors = InputNumbers()
    made = _Sample(None, [], {})
    with ExitStack() as stack:
        for name in (name for site in sites for name in site.linears):

            def watch(forward: Any, *args: Any, name: str = name, **kwargs: Any) -> Any:
                x = args[0] if args else kwargs["input"]
                made.calls.append((name, repr(float(x.sum(dtype=torch.float64)))))
                made.inputs.setdefault(name, []).append(tensors.number_of(x))
                return forward(*args, **kwargs)

            module = policy.module.get_submodule(name)
            stack.enter_context(around_method(module, "forward", watch))
        made.actions = policy.sample_actions(observation, noise)
    return made


def _share_inputs(
    policy: TorchPolicy,
    covered: Sequence[QuantizationSite],
    inputs: Mapping[str, list[int]],
    recipe: Recipe,
) -> list[QuantizationSite]:
    """Linears that read the same tensors in all their calls, and are treated alike, as one site."""
    groups: dict[Any, QuantizationSite] = {}
    for site in policy.sites:
        linear = linears_of(policy.module, site)[0]
        read = inputs.get(site.name)
        key: Any = site.name
        if read and site in covered:
            scheme = recipe.scheme_of(site)
            assert scheme is not None
            like = (linear.in_features, linear.weight.dtype, scheme.model_dump_json())
            key = (*read, site.component, *like)
        first = groups.get(key)
        groups[key] = (
            site if first is None else replace(first, linears=(*first.linears, *site.linears))
        )
    return list(groups.values())


def _difference(expected: _Sample, found: _Sample, again: _Sample) -> str:
    if again.calls != expected.calls or not _equal(again.actions, expected.actions):
        return (
            "sample gives something else each time for one observation and one noise; draw all "
            "that is random from noise (noise_shape=), and reset in sample what the policy "
            "remembers (a queue of actions)"
        )
    before = [name for name, _ in expected.calls]
    after = [name for name, _ in found.calls]
    for name in dict.fromkeys(before):
        if before.count(name) != after.count(name):
            return (
                f"{name!r} is called {before.count(name)} times in a sample, but "
                f"{after.count(name)} times where it is replaced: the module keeps the linear "
                "itself somewhere else (in a list, a closure, a patched forward); call it by its "
                "attribute, or leave it out of the pattern"
            )
    for one, other in zip(expected.calls, found.calls, strict=False):
        if one != other:
            return (
                f"the module computes something else where its linears are replaced, first seen at "
                f"the input of {one[0]!r}: code that looks at the type or the values of a layer "
                "before it; leave that layer out of the pattern"
            )
    return (
        "the module gives other actions where its linears are replaced, although all of them read "
        "the same: code after the last one looks at the type or the values of a layer; leave that "
        "layer out of the pattern"
    )


def _require_storable(policy: TorchPolicy, quantized: set[str]) -> None:
    for name, tensor in policy.module.state_dict().items():
        if name.rpartition(".")[0] in quantized:
            continue
        if not isinstance(tensor, Tensor):
            raise PolicyError(
                f"the module's state has {name!r}, a {type(tensor).__name__}; an artifact holds "
                "tensors only: register it as a buffer, or keep it out of the state dict"
            )
        spec_of(name, storable(tensor))


@contextmanager
def _as_drawn() -> Generator[None, None, None]:
    """PyTorch's own random numbers are the same in every such block, and none are used up."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _slow_attention() -> Generator[None, None, None]:
    """Transformer layers of PyTorch compute in one way, whether their linears are in slots or not.

    Their fast path reads the weights of linears.  A slot's weight turns it off, and its sums are
    other ones in the last bit.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor and array in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield torch.as_tensor(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _equal(first: Any, second: Any) -> bool:
    """Whether two results hold the same tensors, to the bit; NaN is NaN."""
    pairs = list(zip(_tensors(first), _tensors(second), strict=False))
    if len(pairs) != len(list(_tensors(first))) or len(pairs) != len(list(_tensors(second))):
        return False
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
        for a, b in pairs
    )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _text(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
