"""LeRobot builds a module without memory for its weights.

LeRobot's constructors make every parameter and fill it with random numbers.  While they run under
``weights_on_meta``, whatever comes from ``torch.empty`` (the weights of linears, embeddings,
convolutions and norms) has a shape and no memory.  Everything else is computed as usual: tables of
frequencies and masks are in no checkpoint and have to be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from omega_qvla.errors import PolicyError
from omega_qvla.policies.slots import AbsentWeight


class weights_on_meta(TorchFunctionMode):  # noqa: N801 - used as a context
    """Inside the block ``torch.empty`` allocates nothing, and nothing is filled or moved."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        if func is Tensor.to and args[0].is_meta:
            # LeRobot moves what it has built to a device; what has no memory stays where it is.
            dtypes = [x for x in (*args[1:], *options.values()) if isinstance(x, torch.dtype)]
            return func(args[0], dtypes[0]) if dtypes else args[0]
        return func(*args, **options)


def cast(module: nn.Module, usual: str, others: Mapping[str, str]) -> None:
    """Give parameters and stored buffers the dtypes they had, by name; the usual one else."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wanted = getattr(torch, others.get(name, usual).removeprefix("torch."))
        if tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def require_filled(module: nn.Module) -> None:
    """Refuse a module with something besides weights that has no values.

    Raises:
        PolicyError: a table that no checkpoint holds was made by ``torch.empty``; names it.
    """
    stored = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in stored:
            raise PolicyError(_unfilled(name))
    for path, child in module.named_modules():
        for key, value in vars(child).items():
            left_out = isinstance(value, AbsentWeight)
            if isinstance(value, Tensor) and value.is_meta and not left_out:
                raise PolicyError(_unfilled(f"{path}.{key}"))


def _unfilled(name: str) -> str:
    return (
        f"{name!r} of the module is neither in a checkpoint nor computed when it is built: the "
        "policy cannot be loaded without its full-precision weights"
    )
