"""A module of the user's own after quantization: is it the one that was quantized, to the bit?

An artifact holds no code.  The module that is given again to ``load`` is held against what the
artifact says of the one it was made from: linears, shapes, dtypes, steps, noise.  What is not
quantized is computed by PyTorch, whose sums depend, in their last bit, on how a matrix lies in
memory; so it lies after loading as it lay before saving.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.errors import ArtifactError, PolicyError
from omega_qvla.policies.torch_module import TorchPolicy
from omega_qvla.quantization.stored import SiteRecord

_ALIGNMENT = 64
"""Bytes; PyTorch's own allocations on the CPU begin at multiples of it."""
_NAMED = 5


def fitted(policy: TorchPolicy, config: Mapping[str, Any]) -> TorchPolicy:
    """A copy of the policy whose sites are those of an artifact.

    Args:
        policy: what the user gave to ``load``.
        config: of the artifact.

    Raises:
        PolicyError: it is not the policy the artifact was made from; says in what.
        ArtifactError: the artifact does not describe a module.
    """
    stored, found = config["policy"]["config"], policy.describe()[0]
    _require_known(stored, found)
    for key in ("steps", "step_module", "noise_shape"):
        if stored[key] != found[key]:
            raise PolicyError(
                f"the artifact was made from a policy with {key}={stored[key]!r}, this one has "
                f"{found[key]!r}"
            )
    then, now = part_of_linears(stored), part_of_linears(found)
    _require_same(
        "quantized in the artifact, but no linear that this policy's patterns match",
        set(then) - set(now),
    )
    _require_same(
        "matched by this policy's patterns, but not by the artifact's", set(now) - set(then)
    )
    _require_same(
        "in another part (backbone or action_head) than in the artifact",
        {name for name, part in then.items() if now[name] != part},
    )
    _require_same(
        f"of another dtype than in the artifact (mostly {stored['dtype']} there); cast the module "
        "with .to(dtype)",
        _of_other_dtypes(stored, found, policy.module),
    )
    return of_artifact(policy, config).clone()


def of_artifact(policy: TorchPolicy, config: Mapping[str, Any]) -> TorchPolicy:
    """The policy, its linears divided into the sites of an artifact."""
    sites = [SiteRecord.model_validate(item).site for item in config["sites"]]
    quantized = {name for site in sites for name in site.linears}
    kept = [site for site in policy.sites if site.linears[0] not in quantized]
    return policy.with_sites([*sites, *kept])


def part_of_linears(description: Mapping[str, Any]) -> dict[str, str]:
    """The part of the policy that each matched linear belongs to, by its name."""
    return {name: part for part, names in description["linears"].items() for name in names}


def _require_known(stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    missing = sorted(set(found) - set(stored))
    if missing:
        raise ArtifactError(
            f"omega_config.json does not say {', '.join(missing)} of the module it was made from: "
            "quantize it again with this version"
        )


def _require_same(what: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
        raise PolicyError(
            "this is not the module the artifact was made from: "
            f"{', '.join(listed[:_NAMED])}{more} {'is' if len(listed) == 1 else 'are'} {what}"
        )


def _of_other_dtypes(
    stored: Mapping[str, Any], found: Mapping[str, Any], module: nn.Module
) -> list[str]:
    def dtype(description: Mapping[str, Any], name: str) -> str:
        return description["other_dtypes"].get(name, description["dtype"])

    return [
        name
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
        and (tensor.is_floating_point() or tensor.is_complex())
        and dtype(stored, name) != dtype(found, name)
    ]


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """The values with the strides of ``like``, at an address PyTorch would give them."""
    overlapping = any(
        step == 0 and size > 1 for step, size in zip(like.stride(), like.shape, strict=True)
    )
    if value.stride() != like.stride() and not overlapping:
        fresh = torch.empty_strided(
            like.size(), like.stride(), dtype=value.dtype, device=value.device
        )
        return fresh.copy_(value)
    return value.clone() if value.data_ptr() % _ALIGNMENT else value


def align(module: nn.Module) -> None:
    """Give what begins at an odd address (a checkpoint that is mapped) memory of its own."""
    for owner in module.modules():
        own = (owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
        for kind, tensor in chain(*own):
            if tensor.data_ptr() % _ALIGNMENT == 0:
                continue
            fresh = tensor.detach().clone()
            parameter = isinstance(tensor, nn.Parameter)
            setattr(owner, kind, nn.Parameter(fresh, tensor.requires_grad) if parameter else fresh)
