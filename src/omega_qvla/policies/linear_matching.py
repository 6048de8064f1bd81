"""Which linears of a user's module can be quantized: those that are x Wᵀ + b and nothing else.

Quantizing replaces a linear.  Whatever else it did would be gone without a word: the low-rank
branch of a LoRA layer, the norm a hook puts on a weight, a patched ``forward``.  So a matched
linear is a plain one, or it is refused by name before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError
from omega_qvla.policies.base import Component, QuantizationSite

_NAMED = 5
"""Names that a message gives."""

_HARMLESS = {
    "__init__",
    "__repr__",
    "__constants__",
    "extra_repr",
    "in_features",
    "out_features",
    "reset_parameters",
    # what Python writes into every class
    "__abstractmethods__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__static_attributes__",
    "_abc_impl",
}
"""What a subclass may define without computing anything else."""

_LEAVE = "or leave it out of the pattern"


def match_sites(
    module: nn.Module, backbone: str | None, action_head: str | None
) -> tuple[QuantizationSite, ...]:
    """One site for each ``nn.Linear`` whose name a pattern matches, in the order of the module.

    A linear that is reachable under several names is one site, named by the first of them; any of
    them may be matched.

    Raises:
        PolicyError: a pattern is invalid or matches nothing, both match one linear, or a matched
            one does more than multiply and add.
    """
    names = _names_of_linears(module)
    parts: tuple[tuple[Component, str | None], ...] = (
        ("backbone", backbone),
        ("action_head", action_head),
    )
    chosen: dict[str, Component] = {}
    for component, pattern in parts:
        if pattern is None:
            continue
        for name in _matched(names, component, pattern):
            if name in chosen:
                raise PolicyError(f"{name!r} matches both the backbone and the action head pattern")
            chosen[name] = component
    if not chosen:
        raise PolicyError("give a backbone or an action_head pattern: nothing would be quantized")
    _require_plain(module, [name for name in names if name in chosen])
    return tuple(
        QuantizationSite(name, (name,), chosen[name], per_step=chosen[name] == "action_head")
        for name in names
        if name in chosen
    )


def _names_of_linears(module: nn.Module) -> Mapping[str, list[str]]:
    """All names of every linear, by the first of them."""
    found: dict[int, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if name and isinstance(child, nn.Linear):  # the module itself cannot be replaced in itself
            found.setdefault(id(child), []).append(name)
    return {names[0]: names for names in found.values()}


def _matched(names: Mapping[str, list[str]], component: str, pattern: str) -> list[str]:
    try:
        matched = [
            first
            for first, aliases in names.items()
            if any(re.fullmatch(pattern, alias) for alias in aliases)
        ]
    except re.error as error:
        raise PolicyError(f"{component} pattern {pattern!r} is invalid: {error}") from error
    if not matched:
        raise PolicyError(
            f"{component} pattern {pattern!r} matches no nn.Linear; names are like "
            f"{', '.join(list(names)[:_NAMED]) or '(the module has none)'}"
        )
    return matched


def _require_plain(module: nn.Module, names: list[str]) -> None:
    refused: dict[str, str] = {}
    for name in names:
        parent = module.get_submodule(name.rpartition(".")[0])
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        reason = plainness(parent, linear)
        if reason is not None:
            refused[name] = reason
    if refused:
        first, *others = refused
        more = f" (and {len(others)} more: {', '.join(others[:_NAMED])})" if others else ""
        raise PolicyError(f"{first!r}{more} cannot be quantized: {refused[first]}, {_LEAVE}")


def plainness(parent: nn.Module, linear: nn.Linear) -> str | None:
    """What a linear is or does beside x Wᵀ + b, with the remedy; None: it is a plain one."""
    checks: tuple[Callable[[nn.Linear], str | None], ...] = (
        _extra_tensors,
        _own_code,
        _hooks,
        _unusual_weight,
    )
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it: use linears of your own"
    return next((reason for check in checks if (reason := check(linear)) is not None), None)


def _extra_tensors(linear: nn.Linear) -> str | None:
    parts = (linear._parameters, linear._buffers, linear._modules)  # pyright: ignore[reportPrivateUsage]
    held = {name for part in parts for name in part} - {"weight", "bias"}
    if "parametrizations" in held:
        return (
            "its weight is parametrized: bake it in with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if held:
        return (
            f"this {type(linear).__name__} holds more than a weight and a bias "
            f"({', '.join(sorted(held))}): fold it into a plain nn.Linear (merge a LoRA, remove a "
            "weight norm)"
        )
    return None


def _own_code(linear: nn.Linear) -> str | None:
    if "forward" in vars(linear):
        return "its forward was replaced by another function: put that into a module of its own"
    kind = type(linear)
    for base in kind.__mro__:
        if base in nn.Linear.__mro__:
            continue
        defined = sorted(set(vars(base)) - _HARMLESS)
        if defined:
            return (
                f"it is a {kind.__name__}, a subclass of nn.Linear with code of its own "
                f"({', '.join(defined[:_NAMED])}), which would be lost: make it a plain nn.Linear"
            )
    return None


def _hooks(linear: nn.Linear) -> str | None:
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    if any(hooks):
        return (
            "it has forward hooks, whose effect would be lost: remove them (weight norm: "
            "torch.nn.utils.remove_weight_norm, spectral norm: remove_spectral_norm)"
        )
    return None


def _unusual_weight(linear: nn.Linear) -> str | None:
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.layout is not torch.strided:
            return (
                f"its {kind} is a {type(tensor).__name__}, quantized already: give full precision"
            )
        if not tensor.is_floating_point():
            return f"its {kind} is {tensor.dtype}: give full precision"
    return None
