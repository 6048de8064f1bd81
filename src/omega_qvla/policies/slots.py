"""What stands in the place of a linear in a module of the user's own.

The user's code calls every linear by itself, and asks it things: ``proj.weight.dtype`` to cast its
input, ``next(block.parameters()).device`` to make a mask.  A ``LinearSlot`` answers those as the
linear did, and hands the input to whatever computes now: the full-precision linear while a policy
is rehearsed and calibrated, integers afterwards.  What it cannot answer is the values of the
weight: ``AbsentWeight`` refuses every computation, by name, instead of giving wrong numbers.

Linears that read the same tensor (q/k/v, gate/up) share one ``SlotSite``.  It computes the outputs
of all of them at the first call and gives the others theirs when they are called with an input of
the same values at the same flow time.  Inputs are compared, not recognised by identity: nothing
that is done to a tensor between two calls can bring back an output that belongs to other values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from omega_qvla.errors import PolicyError


class Timed(Protocol):
    """The part of a flow clock that matters here."""

    time: float | None


_aten: Any = torch.ops.aten
_DETACHED = (_aten.detach.default, _aten.alias.default)
_NEW_TENSORS = (
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.new_ones.default,
    _aten.new_full.default,
    _aten.empty_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
)
"""What reads nothing of a tensor but its shape, dtype and device."""


class AbsentWeight(Tensor):
    """A parameter without values: it has a shape, a dtype and a device, and takes no memory.

    Args:
        like: the tensor whose shape, dtype and device it answers with.
        name: of the parameter, for the message.

    Raises:
        PolicyError: at every computation with it.
    """

    _is_param: bool
    _path: str

    @staticmethod
    def __new__(cls: type[AbsentWeight], like: Tensor, name: str) -> AbsentWeight:
        # A structure without weights is on no device; what will compute in it is on the CPU.
        device = torch.device("cpu") if like.is_meta else like.device
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=device, requires_grad=False
        )
        made._is_param = True  # what makes it an nn.Parameter to isinstance
        made._path = name
        return made

    def __init__(self, like: Tensor, name: str) -> None:
        del like, name

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Having this at all is what turns off the paths of nn.TransformerEncoderLayer that read
        # weights; they ask torch.overrides.has_torch_function.
        del types
        with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        absent = args[0] if args and isinstance(args[0], AbsentWeight) else None
        if absent is not None and func in _DETACHED:
            return AbsentWeight(absent, absent._path)
        if absent is not None and func in _NEW_TENSORS:
            stand_in = torch.empty(absent.shape, dtype=absent.dtype, device=absent.device)
            return func(stand_in, *args[1:], **(kwargs or {}))
        absent = _first_absent((*args, *(kwargs or {}).values()))
        path = "a quantized weight" if absent is None else repr(absent._path)
        raise PolicyError(
            f"the module computes with {path} directly ({func}), which has no values once its "
            "linear is quantized; call the linear itself, or leave it out of the pattern"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        del tensor_contents
        return f"AbsentWeight({self._path}, {list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AbsentWeight:
        return self


def _first_absent(values: Sequence[Any]) -> AbsentWeight | None:
    for value in values:
        if isinstance(value, AbsentWeight):
            return value
        if isinstance(value, list | tuple):
            found = _first_absent(value)
            if found is not None:
                return found
    return None


class SlotSite(nn.Module):
    """What computes the linears of one site.

    Args:
        compute: x [..., K] → [..., N], the outputs of all linears beside each other.
        splits: their widths, N in all.
        clock: tells the flow time.
    """

    def __init__(self, compute: nn.Module, splits: Sequence[int], clock: Timed) -> None:
        super().__init__()
        self.compute = compute
        self._splits = tuple(splits)
        self._clock = clock
        self._input: Tensor | None = None
        self._time: float | None = None
        self._outputs: dict[int, Tensor] = {}

    def part(self, number: int, x: Tensor) -> Tensor:
        """The output of one linear, [..., splits[number]], contiguous like a linear's own."""
        if len(self._splits) == 1:
            return self.compute(x)
        if number not in self._outputs or not self._same(x):
            parts = self.compute(x).split(self._splits, dim=-1)
            # Each is given away once: a second call with the same values may come at any time
            # later, and must not need them kept until then.
            self._outputs = dict(enumerate(parts))
            self._input, self._time = x.detach().clone(), self._clock.time
        output = self._outputs.pop(number).contiguous()
        if not self._outputs:
            self.forget()
        return output

    def forget(self) -> None:
        """Let go of what has not been asked for."""
        self._input, self._time = None, None
        self._outputs = {}

    def _same(self, x: Tensor) -> bool:
        known = self._input
        if known is None or known.dtype != x.dtype or self._time != self._clock.time:
            return False
        return torch.equal(known, x)


class LinearSlot(nn.Module):
    """In the place of an ``nn.Linear`` of a user's module.

    Its state dict is empty: what a quantized linear holds is stored by site.

    Args:
        name: path of the linear, for messages.
        linear: what was there.
        clock: of the policy.
    """

    site: SlotSite

    def __init__(self, name: str, linear: nn.Linear, clock: Timed) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", _absent(linear.weight, f"{name}.weight"))
        bias = None if linear.bias is None else _absent(linear.bias, f"{name}.bias")
        self.register_parameter("bias", bias)
        self.use(SlotSite(linear, [linear.out_features], clock), 0)

    def use(self, site: SlotSite, number: int) -> None:
        """Compute by this site from now on, as its linear ``number``."""
        self.site, self._number = site, number

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] → [..., N], of the dtype a linear would give."""
        output = self.site.part(self._number, input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and output.dtype is torch.float32:
            return output.to(torch.get_autocast_dtype(kind))
        return output

    @property
    def linear(self) -> nn.Module:
        """What computes."""
        return self.site.compute

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing; see the class."""
        given = kwargs.get("destination")
        return {} if given is None else given


def _absent(tensor: Tensor, name: str) -> Any:
    return AbsentWeight(tensor, name)


class AbsentLinear(nn.Module):
    """In the place of an ``nn.Linear`` that no sample calls: it answers what code asks of a weight.

    It takes no memory and is in no artifact.

    Args:
        name: path of the linear, for messages.
        linear: what was there.
    """

    def __init__(self, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self._name = name
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # No parameters: there is nothing to count or to save.
        vars(self)["weight"] = _absent(linear.weight, f"{name}.weight")
        vars(self)["bias"] = None if linear.bias is None else _absent(linear.bias, f"{name}.bias")

    def forward(self, input: Tensor) -> Tensor:
        """Always refused.

        Raises:
            PolicyError: nothing has called it when the policy was quantized.
        """
        del input
        raise PolicyError(
            f"{self._name!r} was never called when the policy was quantized, so its weights were "
            "left out; it is called now: the policy is used in another way"
        )


PATH_IN_SLOT = ".site.compute"
"""From a slot to what computes in it."""


def fill_slots(module: nn.Module, names: Sequence[str], compute: nn.Module, clock: Timed) -> None:
    """Let ``compute`` stand for linears of a user's module, wherever they can be reached.

    Args:
        module: the network.
        names: paths of the linears, in the order ``compute`` puts their outputs beside each other.
        compute: x [..., K] → [..., N].
        clock: of the policy.
    """
    slots = [_slot(module, name, clock) for name in names]
    site = SlotSite(compute, [slot.out_features for slot in slots], clock)
    for number, slot in enumerate(slots):
        slot.use(site, number)


def forget_shared(module: nn.Module) -> None:
    """Let go of outputs that were computed and never asked for."""
    for child in module.modules():
        if isinstance(child, SlotSite):
            child.forget()


def _slot(module: nn.Module, name: str, clock: Timed) -> LinearSlot:
    there = module.get_submodule(name)
    if isinstance(there, LinearSlot):
        return there
    assert isinstance(there, nn.Linear)
    slot = LinearSlot(name, there, clock)
    replace_everywhere(module, there, slot)
    return slot


def replace_everywhere(module: nn.Module, there: nn.Module, other: nn.Module) -> None:
    """Put another submodule in all places where one can be reached."""
    places = [
        (parent, kind)
        for parent in module.modules()
        # The same one twice too, unlike named_children.
        for kind, child in parent._modules.items()  # pyright: ignore[reportPrivateUsage]
        if child is there
    ]
    for parent, kind in places:
        setattr(parent, kind, other)


_REMEMBERED = 8
"""Tensors among which a linear's input is looked for: other linears may be called between two."""


class InputNumbers:
    """Numbers tensors as they come in; one that is seen again unchanged keeps its number."""

    def __init__(self) -> None:
        self._recent: list[tuple[int, Tensor, int | None]] = []
        self._next = 0

    def number_of(self, x: Tensor) -> int:
        """The number of a tensor that a linear reads now."""
        for number, known, version in self._recent:
            if same_tensor(known, version, x):
                return number
        self._recent = [*self._recent[1 - _REMEMBERED :], (self._next, x, version_of(x))]
        self._next += 1
        return self._next - 1


def same_tensor(first: Tensor, version: int | None, second: Tensor) -> bool:
    """Whether a tensor seen before at a version is the one seen now, unchanged.

    ``first`` has to be held by the caller: no other tensor can be in its memory then.
    """
    return (
        version is not None
        and version == version_of(second)
        and first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
    )


def version_of(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


def storable(tensor: Tensor) -> Tensor:
    """As an artifact holds it: complex numbers [...] as pairs [..., 2]."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
