"""What the modules of other people do with their linears: right once quantized, or refused first.

Every module here is a small copy of something found in LeRobot, openpi, PEFT or PyTorch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import omega_qvla as oq
from omega_qvla.errors import OmegaError, PolicyError
from omega_qvla.flow_time import FlowClock
from omega_qvla.policies.slots import AbsentWeight, LinearSlot, SlotSite
from omega_qvla.recipe import Recipe

WIDTH = 24


def run(module: nn.Module, observation: Any, noise: Any, clock: FlowClock) -> Tensor:
    del noise, clock
    return module(observation["x"])


def wrap(module: nn.Module, backbone: str = ".*", **changes: Any) -> oq.TorchPolicy:
    return oq.TorchPolicy(module, sample=run, backbone=backbone, **changes)


@pytest.fixture
def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 5, WIDTH, generator=generator)} for _ in range(3)]


def seeded(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return module


def linear(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def quantized_close(
    module: nn.Module, data: list[dict[str, Tensor]], tmp_path: Path, again: nn.Module
) -> Any:
    """Quantize; the actions are near full precision's, and the same to the bit when loaded."""
    policy = wrap(module)
    exact = policy.clone().sample_actions(data[0])
    quantized = oq.quantize(policy, data)
    ours = quantized.sample_actions(data[0])
    assert ours.dtype == exact.dtype and ours.shape == exact.shape
    assert (ours - exact).square().mean() < 0.05 * exact.square().mean()
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=wrap(again))
    for item in data:
        assert torch.equal(loaded.sample_actions(item), quantized.sample_actions(item))
    return quantized


# --- what a linear is asked ----------------------------------------------------------------------


class AsksItsWeight(nn.Module):
    """Casts to the dtype of a projection's weight and makes a mask where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.q.weight
        x = x.to(weight.dtype).to(weight.device)
        assert weight.data.dtype == weight.dtype and weight.shape == (WIDTH, WIDTH)
        assert self.q.bias is not None and self.q.in_features == WIDTH
        mask = weight.new_zeros(x.shape[-1])
        return self.o(torch.tanh(self.q(x) + mask))


class AsksItsParameters(nn.Module):
    """Takes device and dtype from the first parameter of a block that is all linears."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(linear(), nn.SiLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.block.parameters())
        assert isinstance(first, nn.Parameter)
        return self.block(x.to(device=first.device, dtype=first.dtype))


class CallsByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.second.forward(torch.tanh(self.first(input=x)))


class SharesALinear(nn.Module):
    """One linear under two names in one module and a third in another, and a block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.again = linear()
        self.inner = nn.ModuleDict({"third": self.up})
        block = nn.Sequential(linear(), nn.Tanh())
        self.layers = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.up(x)))
        for layer in self.layers:
            x = layer(x)
        return self.inner["third"](x)


class TiesAnEmbedding(nn.Module):
    """A head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.table(torch.arange(5)))


class OddTensors(nn.Module):
    """Buffers and layouts of every kind, and an unquantized layer whose memory is not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = linear()
        self.scale = nn.Parameter(torch.ones(3))
        self.turned = nn.Parameter(torch.ones(WIDTH, 7).t())
        self.conv = nn.Conv2d(1, 5, 3, padding=1).to(memory_format=torch.channels_last)
        self.register_buffer("mask", torch.rand(5, 1) > 0.5)
        self.register_buffer("order", torch.arange(5).flip(0))
        self.register_buffer("phase", torch.polar(torch.ones(5, 1), torch.rand(5, 1)))
        hidden = torch.zeros(5, WIDTH)
        hidden[0] = -torch.inf
        self.register_buffer("hidden", hidden, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)[:, self.order]
        y = y * self.mask + (y.to(torch.complex64) * self.phase).real
        y = y + torch.softmax(y + self.hidden, dim=1)
        y = y + self.conv(y[:, None]).mean(1) + self.scale.sum()
        return y + y @ self.turned.t() @ self.turned


class CastsUnderAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
            assert y.dtype is torch.bfloat16
            return self.second(y).float()


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True, norm_first=True)
    return nn.Sequential(layer, nn.LayerNorm(WIDTH))


@pytest.mark.parametrize(
    "make",
    [
        AsksItsWeight,
        AsksItsParameters,
        CallsByKeyword,
        SharesALinear,
        TiesAnEmbedding,
        OddTensors,
        CastsUnderAutocast,
    ],
)
def test_right_once_quantized(
    make: Callable[[], nn.Module], data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    def made(seed: int) -> nn.Module:
        module = make()
        return seeded(module, seed)

    first = made(0)
    second = made(1)
    for kind in ("hidden",):  # what no artifact holds comes from the module given again
        if hasattr(first, kind):
            setattr(second, kind, getattr(first, kind))
    quantized_close(first, data, tmp_path, second)


def test_a_linear_of_several_names_is_quantized_under_all_of_them(
    data: list[dict[str, Tensor]],
) -> None:
    module = seeded(SharesALinear())
    quantized = oq.quantize(wrap(module, r"inner\.third|layers\.1\.0"), data)
    assert [site.site.name for site in quantized.sites] == ["up", "layers.0.0"]
    made = quantized.policy.module
    assert isinstance(made.up, LinearSlot)
    assert made.again is made.up and made.inner["third"] is made.up
    assert isinstance(made.layers[1][0], LinearSlot) and isinstance(module.up, nn.Linear)


def test_a_transformer_layer_of_pytorch_runs_its_linears_and_not_its_fast_path(
    data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """The fast path reads the weights of linears and never calls them."""
    pattern = r".*linear\d"
    policy = wrap(seeded(encoder_layer()).eval(), pattern)
    exact = policy.sample_actions(data[0])
    assert torch.backends.mha.get_fastpath_enabled()
    quantized = oq.quantize(policy, data)
    assert torch.backends.mha.get_fastpath_enabled()
    ours = quantized.sample_actions(data[0])
    assert (ours - exact).square().mean() < 0.05 * exact.square().mean()
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=wrap(seeded(encoder_layer(), 3), pattern))
    assert torch.equal(loaded.sample_actions(data[0]), ours)


@pytest.mark.parametrize(
    "name", ["rtn", "gptq", "smoothquant", "quarot", "duquant", "svdquant", "omega-w4a4-static"]
)
def test_every_recipe_is_the_same_to_the_bit_after_loading(
    name: str, data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    first, second = seeded(OddTensors()), seeded(OddTensors(), 1)
    second.hidden = first.hidden
    quantized = oq.quantize(wrap(first), data, name)
    quantized.save_pretrained(tmp_path / "out")
    loaded = oq.load(tmp_path / "out", policy=wrap(second))
    for item in data:
        assert torch.equal(loaded.sample_actions(item), quantized.sample_actions(item))


def test_a_mapped_checkpoint_is_the_same_to_the_bit_after_loading(
    data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """Weights at odd addresses, as a checkpoint file that is mapped gives them."""
    module = nn.Sequential(linear(), nn.Tanh(), linear(WIDTH, 33), nn.Tanh(), linear(33, 7))
    seeded(module)
    for child in (module[2], module[4]):
        for kind, tensor in list(child.named_parameters()):
            memory = torch.empty(tensor.numel() + 1)
            odd = memory[1:].view(tensor.shape)
            odd.copy_(tensor.detach())
            setattr(child, kind, nn.Parameter(odd))
    assert module[2].weight.data_ptr() % 64
    quantized = oq.quantize(wrap(module, "0"), data)
    quantized.save_pretrained(tmp_path / "out")
    again = nn.Sequential(linear(), nn.Tanh(), linear(WIDTH, 33), nn.Tanh(), linear(33, 7))
    loaded = oq.load(tmp_path / "out", policy=wrap(again, "0"))
    for item in data:
        assert torch.equal(loaded.sample_actions(item), quantized.sample_actions(item))


# --- linears that read one tensor ----------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, width) for width in (24, 8, 8))
        self.o = linear()

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q = self.q(x).view(*x.shape[:-1], 3, 8).transpose(-3, -2)
        k, v = self.k(memory)[..., None, :, :], self.v(memory)[..., None, :, :]
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return self.o(y.transpose(-3, -2).reshape(-1).view(x.shape))


def test_linears_that_read_one_tensor_are_one_site(
    data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    quantized = quantized_close(seeded(Attention()), data, tmp_path, seeded(Attention(), 1))
    assert [site.site.linears for site in quantized.sites] == [("q", "k", "v"), ("o",)]
    tensors = quantized.tensors()
    assert tensors["q.weight_packed"].shape[0] == 40 and "k.weight_packed" not in tensors


def test_a_site_multiplies_once_for_all_its_linears(data: list[dict[str, Tensor]]) -> None:
    quantized = oq.quantize(wrap(seeded(Attention())), data)
    slot = quantized.policy.module.q
    assert isinstance(slot, LinearSlot) and slot.site is quantized.policy.module.v.site
    calls: list[int] = []
    slot.site.compute.register_forward_pre_hook(lambda *_: calls.append(1))
    quantized.sample_actions(data[0])
    assert len(calls) == 1
    assert slot.site._outputs == {} and slot.site._input is None  # nothing is kept


def test_linears_are_fused_only_where_all_their_inputs_are_one(
    data: list[dict[str, Tensor]],
) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.attention(x), x.flip(0))

    quantized = oq.quantize(wrap(seeded(Cross())), data)
    names = [site.site.linears for site in quantized.sites]
    assert names == [("attention.q",), ("attention.k", "attention.v"), ("attention.o",)]


def test_a_fused_site_sees_inputs_that_differ_after_all(data: list[dict[str, Tensor]]) -> None:
    """The first observation shows one tensor, another one two: both count, and both are right."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            other = x if float(x[0, 0, 0]) == float(first[0, 0, 0]) else 3.0 * x
            return self.a(x) - self.b(other)

    first = data[0]["x"]
    policy = wrap(seeded(Switch()))
    quantized = oq.quantize(policy, data)
    assert [site.site.linears for site in quantized.sites] == [("a", "b")]
    for item in data:
        exact, ours = policy.sample_actions(item), quantized.sample_actions(item)
        assert (ours - exact).square().mean() < 0.05 * exact.square().mean()


class Doubling(nn.Module):
    """Stands for two linears of width 3: x and −x."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=-1)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from(["first", "second", "in place", "data", "numpy", "new", "time", "forget"]),
        max_size=12,
    )
)
def test_no_order_of_calls_and_writes_gives_an_output_of_other_values(steps: list[str]) -> None:
    clock = FlowClock()
    site = SlotSite(Doubling(), (3, 3), clock)
    x = torch.arange(6.0).view(2, 3)
    for number, step in enumerate(steps, start=1):
        if step in ("first", "second"):
            part = ("first", "second").index(step)
            found = site.part(part, x)
            assert torch.equal(found, -x if part else x) and found.is_contiguous()
            found.fill_(torch.nan)  # what a caller does with its output is its own affair
        elif step == "in place":
            x.add_(number)
        elif step == "data":
            x.data.mul_(number)
        elif step == "numpy":
            x.numpy()[0] = number
        elif step == "new":
            x = torch.full((2, 3), float(number))
        elif step == "time":
            clock.time = 1.0 / number
        else:
            site.forget()


# --- refused before any work ---------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2.0 * super().forward(input)


class LowRank(nn.Linear):
    """As loralib's: a linear with a low-rank branch of its own."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.lora_a, self.lora_b = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)


class OnlyInitialised(nn.Linear):
    """Begins with other numbers, and computes what a linear does."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


def hooked() -> nn.Module:
    made = linear()
    made.register_forward_hook(lambda _module, _inputs, output: output + 1.0)
    return made


def patched() -> nn.Module:
    made = linear()
    plain = made.forward
    made.forward = lambda input: plain(input).relu()
    return made


def quantized_already() -> nn.Module:
    class Packed(Tensor):
        pass

    made = linear()
    made.weight = nn.Parameter(made.weight.detach().as_subclass(Packed), requires_grad=False)
    return made


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Scaled(WIDTH, WIDTH), r"it is a Scaled, a subclass of nn\.Linear .*\(forward\)"),
        (LowRank, r"this LowRank holds more than .*lora_a, lora_b"),
        (hooked, "it has forward hooks"),
        (patched, "its forward was replaced"),
        (lambda: nn.utils.weight_norm(linear()), "weight_g, weight_v"),
        (lambda: nn.utils.spectral_norm(linear()), "weight_orig"),
        (lambda: nn.utils.parametrizations.weight_norm(linear()), "remove_parametrizations"),
        (quantized_already, "its weight is a Packed, quantized already"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_more_than_a_linear_is_refused_by_name(
    make: Callable[[], nn.Module], expected: str
) -> None:
    module = nn.Sequential(linear(), make())
    with pytest.raises(PolicyError, match=rf"'1' cannot be quantized: .*{expected}"):
        wrap(module, "[01]")
    assert wrap(module, "0").sites[0].name == "0"


def test_a_subclass_that_computes_nothing_else_is_a_linear(
    data: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(OnlyInitialised(WIDTH, WIDTH))

    quantized_close(make(), data, tmp_path, make())


def test_attention_of_pytorch_is_refused_by_name() -> None:
    with pytest.raises(PolicyError, match=r"'0\.self_attn\.out_proj' cannot .*MultiheadAttention"):
        wrap(encoder_layer())


class ComputesWithItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.proj(x), self.head.weight)


class KeepsAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.steps = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class LooksAtTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x.relu() if isinstance(self.b, nn.Linear) else x
        return self.c(self.b(x))


class DrawsItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.generator = linear(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + float(self.generator.random())

    def __deepcopy__(self, memo: dict[int, Any]) -> DrawsItsOwn:
        twin = DrawsItsOwn()
        twin.generator = self.generator
        return twin


class LooksItUp(nn.Module):
    """Fails in its own way when a linear is not one any more."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor) -> Tensor:
        return {nn.Linear: self.a}[type(self.a)](x)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ComputesWithItsWeight, r"computes with 'head\.weight' directly .*leave it out"),
        (KeepsAList, r"'a' is called 1 times in a sample, but 0 times where it is replaced.*list"),
        (LooksAtTypes, "something else where its linears are replaced, .* input of 'b'"),
        (DrawsItsOwn, r"sample gives something else each time .*noise_shape"),
        (LooksItUp, "cannot be sampled once its linears are replaced: KeyError"),
    ],
)
def test_what_cannot_survive_is_refused_before_any_work(
    make: Callable[[], nn.Module],
    expected: str,
    data: list[dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    begun: list[str] = []
    with pytest.raises(PolicyError, match=expected):
        oq.quantize(
            wrap(seeded(make())),
            data,
            work_directory=tmp_path / "journal",
            progress=lambda _done, _total, name: begun.append(name),
        )
    assert begun == [] and not (tmp_path / "journal").exists()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.eye(3).to_sparse(), "'table' is .*sparse"),
        (torch.tensor([1.0, -torch.inf]), "table.*has NaN or Inf.*persistent=False"),
    ],
)
def test_what_no_artifact_can_hold_is_refused_before_any_work(
    tensor: Tensor, expected: str, data: list[dict[str, Tensor]]
) -> None:
    module = nn.Sequential(linear())
    module.register_buffer("table", tensor)
    begun: list[str] = []
    with pytest.raises(OmegaError, match=expected):
        oq.quantize(wrap(module), data, progress=lambda _done, _total, name: begun.append(name))
    assert begun == []


def test_a_recipe_for_policies_that_name_their_attention_is_refused_before_any_work(
    data: list[dict[str, Tensor]],
) -> None:
    begun: list[str] = []
    with pytest.raises(PolicyError, match="does not name the attention layers"):
        oq.quantize(
            wrap(seeded(AsksItsWeight())),
            data,
            "quantvla",
            progress=lambda _done, _total, name: begun.append(name),
        )
    assert begun == []


def test_state_that_is_no_tensor_is_refused(data: list[dict[str, Tensor]]) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

    with pytest.raises(PolicyError, match="'_extra_state', a dict"):
        oq.quantize(wrap(Extra(linear())), data)


def test_an_absent_weight_says_what_it_is_and_is_never_a_number() -> None:
    weight = AbsentWeight(torch.zeros(4, 3, dtype=torch.bfloat16), "head.weight")
    assert isinstance(weight, nn.Parameter) and weight.numel() == 12
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.bfloat16, "cpu", (4, 3))
    assert weight.to(torch.bfloat16) is weight and "head.weight" in repr(weight)
    assert torch.zeros_like(weight).dtype is torch.bfloat16
    for compute in (
        lambda: weight + 1,
        lambda: weight[0],
        lambda: weight.float(),
        lambda: weight.t(),
        lambda: torch.cat([weight, weight]),
        lambda: F.linear(torch.zeros(1, 3, dtype=torch.bfloat16), weight),
        lambda: weight.copy_(torch.zeros(4, 3)),
    ):
        with pytest.raises(PolicyError, match=r"'head\.weight' directly"):
            compute()


def test_a_recipe_that_is_a_simulation_runs_a_users_module_too(
    data: list[dict[str, Tensor]],
) -> None:
    assert not Recipe.load("omega-paper").realizable
    policy = wrap(seeded(AsksItsWeight()))
    simulated = oq.quantize(policy, data, "omega-paper")
    exact, ours = policy.sample_actions(data[0]), simulated.sample_actions(data[0])
    assert (ours - exact).square().mean() < 0.05 * exact.square().mean()
