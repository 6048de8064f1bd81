"""What the GPU computes between two products, under Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from elementwise_oracles import UNFIT, activation, check_close, drawn, gated, normed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreted_triton import Call, Check, Interpreter, Step, numpy_operands
from torch import Tensor

from omega_qvla.artifact.packing import pack_int4
from omega_qvla.errors import ObservationError, PolicyError
from omega_qvla.policies.layers.elementwise import (
    TORCH,
    Elementwise,
    ElementwiseModule,
    Gate,
    use_elementwise,
)
from omega_qvla.policies.native import NativePolicy
from omega_qvla.runtime.fused import FusedElementwise
from omega_qvla.runtime.kernels import reference, triton_elementwise
from omega_qvla.runtime.kernels import triton as gpu
from omega_qvla.runtime.kernels.triton_tuning import Tiling

pytestmark = pytest.mark.emulated

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TILINGS = (
    Tiling(rows=16, outputs=64, bytes=64, parts=3, warps=4, stages=2),
    Tiling(rows=32, outputs=64, bytes=128, parts=1, warps=4, stages=4),
)
kinds = st.sampled_from(["gelu_tanh", "silu"])


@settings(relaxed, max_examples=12)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    width=st.integers(1, 150),
    rows=st.sampled_from(["one", "each", "gain"]),
    base=st.sampled_from([0.0, 1.0]),
    centred=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_norms_with_their_modulation(
    interpreted: Interpreter,
    batch: int,
    tokens: int,
    width: int,
    rows: str,
    base: float,
    centred: bool,
    seed: int,
) -> None:
    """Modulation as it is in a policy: a slice of a table, one row for all chunks or one each."""
    x = 3.0 * drawn(seed, batch, tokens, width) + 0.5
    table = drawn(seed + 1, 1 if rows == "one" else batch, 3, width)
    scale, shift = table[:, None, 0], table[:, None, 1]
    arguments: dict[str, Any] = {"x": x.numpy(), "base": base, "eps": 1e-6, "centred": centred}
    slices: dict[str, Any] = {}
    if rows == "gain":
        scale, shift = table[0, 0], torch.zeros(())
        arguments |= {"scale": scale.numpy(), "shift": None}
    else:
        arguments |= {"scale": table.numpy(), "shift": table.numpy()}
        slices = {"scale": np.s_[:, None, 0], "shift": np.s_[:, None, 1]}
    found = interpreted.array(Step("normalize", arguments, slices))
    wanted, terms = normed(x, base + scale.double(), shift, eps=1e-6, centred=centred)
    check_close(torch.from_numpy(found), wanted, terms)


@settings(relaxed, max_examples=12)
@given(rows=st.integers(1, 5), width=st.integers(1, 1100), kind=kinds, seed=st.integers(0, 10**6))
def test_gated_products(
    interpreted: Interpreter, rows: int, width: int, kind: str, seed: int
) -> None:
    """Both halves of one output, from far below zero, where an exponential is infinite, to far
    above."""
    both = drawn(seed, 2, rows, 2 * width)
    both[0, 0, 0], both[-1, -1, width - 1] = -2e4, 2e4
    arguments = {"kind": kind, "gate": both.numpy(), "up": both.numpy()}
    slices = {"gate": np.s_[..., :width], "up": np.s_[..., width:]}
    found = interpreted.array(Step("gated_product", arguments, slices))
    check_close(torch.from_numpy(found), *gated(kind, *both.split(width, dim=-1)))


@settings(relaxed, max_examples=12)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 4),
    half=st.integers(1, 40),
    shared=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rotations_are_the_definitions_bit_for_bit(
    interpreted: Interpreter,
    batch: int,
    heads: int,
    tokens: int,
    half: int,
    shared: bool,
    seed: int,
) -> None:
    """Heads as they come out of a fused projection, beside others."""
    every = drawn(seed, batch, heads + 1, tokens, 2 * half)
    angle = drawn(seed + 1, 1 if shared else batch, 1, tokens, half)
    table = angle.cos(), angle.sin()
    arguments = {"x": every.numpy(), "cosine": table[0].numpy(), "sine": table[1].numpy()}
    found = interpreted.array(Step("rotate", arguments, {"x": np.s_[:, 1:]}))
    assert np.array_equal(found, TORCH.rotate(every[:, 1:], table).numpy())


def integers(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)


@settings(relaxed, max_examples=6)
@given(
    m=st.integers(1, 40),
    half=st.integers(1, 70),
    k=st.integers(1, 300),
    kind=kinds,
    static=st.sampled_from([None, 0.6]),
    biased=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_product_that_ends_in_its_gate(
    interpreted: Interpreter,
    m: int,
    half: int,
    k: int,
    kind: Gate,
    static: float | None,
    biased: bool,
    seed: int,
) -> None:
    """The integers' sums are exact; scales, gate and product are a few roundings, cut along K or
    not."""
    weight = integers(2 * half, k, seed)
    bias = drawn(seed + 1, 2 * half) if biased else None
    scales = drawn(seed + 2, 2 * half).abs() + 0.05
    rows = drawn(seed + 3, m, k)
    scale = reference.row_scales(rows, 4) if static is None else torch.tensor(static)
    q = reference.quantize_rows(rows, scale, 4)
    product = q.double() @ weight.t().double() * scales.double() * scale.double()
    y = product if bias is None else product + bias.double()
    call = Call(
        numpy_operands(
            words=pack_int4(weight),
            weight_scale=scales,
            columns=k,
            bias=bias,
            activation_bits=4,
            processors=8,
        ),
        rows.numpy(),
        static,
        tilings=TILINGS,
        gate=kind,
    )
    found = interpreted(call)
    gate, up = y.split(half, dim=-1)
    largest = (product.abs() + (0 if bias is None else bias.double().abs())).split(half, dim=-1)
    passed = activation(kind, gate)
    size = (passed.abs() * (4.0 + gate.abs()) + 2.0 * largest[0]) * (up.abs() + largest[1])
    for output in (found.output, *found.tiled):
        check_close(torch.from_numpy(output), passed * up, size)


def test_a_gate_needs_two_halves_and_one_scale_per_output() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: make gpu")
    odd = gpu.PackedLinear(torch.zeros((5, 2), dtype=torch.int32), torch.ones(5), columns=12)
    with pytest.raises(PolicyError, match="two halves"):
        odd.gated(torch.zeros((1, 12)), "silu")
    grouped = gpu.PackedLinear(
        torch.zeros((4, 2), dtype=torch.int32), torch.ones((4, 1)), columns=12, group=64
    )
    with pytest.raises(PolicyError, match="group 64"):
        grouped.gated(torch.zeros((1, 12)), "silu")
    even = gpu.PackedLinear(torch.zeros((4, 2), dtype=torch.int32), torch.ones(4), columns=12)
    assert even.gated(torch.zeros((0, 12)), "silu").shape == (0, 2)
    with pytest.raises(ObservationError):
        even.gated(torch.zeros((1, 11)), "silu")


@pytest.mark.parametrize(("scale", "shift"), UNFIT.values(), ids=UNFIT)
def test_modulation_that_does_not_fit_is_refused(scale: Tensor, shift: Tensor | None) -> None:
    with pytest.raises(ObservationError, match="cannot be modulated"):
        triton_elementwise.normalize(torch.zeros((2, 3, 8)), scale, shift, eps=1e-6, centred=False)


def test_more_numbers_than_a_program_counts_are_refused() -> None:
    wide = torch.zeros((1, 1)).expand(1 << 20, 1 << 11)
    with pytest.raises(ObservationError, match="2³¹"):
        triton_elementwise.gated_product("silu", wide, wide)
    with pytest.raises(ObservationError, match="a gate of"):
        triton_elementwise.gated_product("silu", torch.zeros(2, 3), torch.zeros(2, 4))
    heads, table = (
        wide.view(1, 1, 1 << 20, 1 << 11),
        torch.zeros((1, 1, 1)).expand(1, 1 << 20, 1 << 10),
    )
    with pytest.raises(ObservationError, match="2³¹"):
        triton_elementwise.rotate(heads, table.unsqueeze(0), table.unsqueeze(0))
    with pytest.raises(ObservationError, match="cannot be rotated"):
        triton_elementwise.rotate(torch.zeros((1, 2, 3, 4)), *[torch.zeros((1, 1, 2, 2))] * 2)


def test_what_checks_a_gpu_passes_the_interpreter_and_finds_what_is_wrong(
    interpreted: Interpreter,
) -> None:
    """`make bench-gpu` begins with these."""
    assert interpreted.check(Check("check_layers", 3)) == {"layers_equal_bit_for_bit": 3}
    found = interpreted.check(Check("check_elementwise", 2))
    assert found == {"elementwise_within_rounding": 8}
    for program in ("normalize", "gated_product", "rotate"):
        told = interpreted.check(Check("check_elementwise", 1, spoil=program))
        assert isinstance(told, str) and "MismatchError" in told
        assert ("same bits" if program == "rotate" else "roundings") in told


class Recorded(Elementwise):
    """The definition, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "asked":
            self.asked.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        (
            "small_policy",
            {"rms_norm", "adaptive_rms_norm", "add_gated", "gated_linears", "activate", "rotate"},
        ),
        (
            "small_gr00t",
            {
                "rms_norm",
                "adaptive_layer_norm",
                "layer_norm",
                "gated_linears",
                "activate",
                "rotate",
            },
        ),
    ],
)
def test_every_layer_of_a_policy_asks_what_it_is_given(
    family: str, wanted: set[str], request: pytest.FixtureRequest, noise: np.ndarray, few: Any
) -> None:
    policy: NativePolicy = request.getfixturevalue(family).clone()
    before = policy.sample_normalized(few[0], noise)
    own = Recorded()
    use_elementwise(policy.module, own)
    assert torch.equal(policy.sample_normalized(few[0], noise), before)
    assert wanted <= own.asked
    layers = [child for child in policy.module.modules() if isinstance(child, ElementwiseModule)]
    assert layers and all(layer.elementwise is own for layer in layers)
    others = request.getfixturevalue(family).module.modules()
    assert all(
        layer.elementwise is TORCH for layer in others if isinstance(layer, ElementwiseModule)
    )


def test_fusing_leaves_nothing_out() -> None:
    """What a layer may ask for and the GPU has nothing of its own for is named."""
    methods = {name for name in vars(Elementwise) if not name.startswith("_")}
    assert methods - {"activate", "layer_norm"} == {
        name for name in vars(FusedElementwise) if not name.startswith("_")
    }
