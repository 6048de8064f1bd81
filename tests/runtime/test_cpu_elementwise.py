"""What the C++ kernels compute between linears: float64 is the oracle, and all paths agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elementwise_oracles import UNFIT, check_close, drawn, gated, normed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import omega_qvla as oq
from omega_qvla.calibration.observations import Observations
from omega_qvla.errors import ObservationError, ResourceError
from omega_qvla.policies.layers.elementwise import (
    TORCH,
    Elementwise,
    ElementwiseModule,
    Gate,
    use_elementwise,
)
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.runtime.engine import QuantizedPolicy, SimulatedPolicy
from omega_qvla.runtime.fused import CpuElementwise
from omega_qvla.runtime.kernels import cpu, cpu_elementwise
from omega_qvla.threads import available_cores

pytestmark = pytest.mark.skipif(not cpu.instruction_sets(), reason="built without C++ kernels")
quick = settings(deadline=None, max_examples=60)
kinds = st.sampled_from(["gelu_tanh", "silu"])
SPECIAL = [0.0, -0.0, 1e-40, -1e-40, 88.0, -88.0, 89.5, -89.5, 2e4, -2e4, 1e19, -1e19, 3e38, -3e38]


def by_every_path(compute: Any) -> Tensor:
    """What one function of (path, threads) gives, the same bits on every path and with help."""
    numbers = [cpu.path_number(name) for name in cpu.instruction_sets()]
    helpers = min(2, available_cores())
    first, *others = [compute(number, threads) for number in numbers for threads in {1, helpers}]
    for other in others:
        assert torch.equal(first.view(torch.int32), other.view(torch.int32))
    return first


@quick
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    width=st.integers(1, 150),
    rows=st.sampled_from(["one", "each", "gain", "none"]),
    base=st.sampled_from([0.0, 1.0]),
    centred=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_norms_with_their_modulation(
    batch: int, tokens: int, width: int, rows: str, base: float, centred: bool, seed: int
) -> None:
    """Modulation as it is in a policy: a slice of a table, one row for all chunks or one each."""
    x = (3.0 * drawn(seed, batch, tokens, 2 * width) + 0.5)[..., width:]
    table = drawn(seed + 1, 1 if rows == "one" else batch, 3, width)
    modulation: list[Tensor] = {
        "none": [],
        "gain": [table[0, 0]],
    }.get(rows, [table[:, None, 0], table[:, None, 1]])
    found = by_every_path(
        lambda path, threads: cpu_elementwise.normalize(
            path, threads, x, *modulation, base=base, eps=1e-6, centred=centred
        )
    )
    factor = base + modulation[0].double() if modulation else torch.ones(())
    shift = modulation[1] if len(modulation) > 1 else torch.zeros(())
    check_close(found, *normed(x, factor, shift, eps=1e-6, centred=centred))


@quick
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 200),
    kind=kinds,
    alone=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_gates(rows: int, width: int, kind: Gate, alone: bool, seed: int) -> None:
    """Both halves of one output, with numbers whose exponential is 0 or infinite among them."""
    both = 4.0 * drawn(seed, 2, rows, 2 * width)
    gate, up = both.split(width, dim=-1)
    count = min(len(SPECIAL), width)
    gate[0, 0, :count] = torch.tensor(SPECIAL)[:count]
    found = by_every_path(
        lambda path, threads: cpu_elementwise.gate(path, threads, kind, gate, None if alone else up)
    )
    up = torch.ones_like(up) if alone else up
    wanted, size = gated(kind, gate, up)
    check_close(found.double().clamp(-1e38, 1e38), wanted.clamp(-1e38, 1e38), size)


@pytest.mark.parametrize("kind", ["gelu_tanh", "silu"])
def test_what_is_not_a_number_stays_so_and_infinity_passes(kind: Gate) -> None:
    x = torch.tensor([float("nan"), float("inf"), 1.0])
    found = by_every_path(lambda path, threads: cpu_elementwise.gate(path, threads, kind, x))
    assert found[0].isnan() and found[1] == float("inf") and found[2].isfinite()


@quick
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 6),
    half=st.integers(1, 40),
    shared=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_rotations_are_the_definitions_bit_for_bit(
    batch: int, heads: int, tokens: int, half: int, shared: bool, seed: int
) -> None:
    """Heads as they come out of a fused projection, beside others."""
    wide = drawn(seed, batch, tokens, (heads + 1) * 2 * half)
    x = wide[..., 2 * half :].unflatten(-1, (heads, 2 * half)).transpose(-3, -2)
    angle = drawn(seed + 1, 1 if shared else batch, 1, tokens, half)
    table = angle.cos(), angle.sin()
    found = by_every_path(lambda path, threads: cpu_elementwise.rotate(path, threads, x, *table))
    assert found.is_contiguous()
    assert torch.equal(found, TORCH.rotate(x, table))


def test_rows_are_shared_among_threads() -> None:
    """More than one item, so that helpers have something to do."""
    x, up = drawn(1, 700, 300), drawn(2, 700, 300)
    angle = drawn(3, 1, 1, 700, 64)
    heads = drawn(4, 1, 2, 700, 128)
    for compute in (
        lambda path, threads: cpu_elementwise.gate(path, threads, "silu", x, up),
        lambda path, threads: cpu_elementwise.normalize(path, threads, x, eps=1e-6, centred=True),
        lambda path, threads: cpu_elementwise.rotate(path, threads, heads, angle, angle),
    ):
        by_every_path(compute)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_nothing_is_computed_of_nothing(shape: tuple[int, ...]) -> None:
    own = CpuElementwise(cpu.instruction_sets()[0])
    x = torch.zeros(shape)
    assert own.activate("silu", x).shape == own.layer_norm(x, 1e-6).shape == shape


@pytest.mark.parametrize(("scale", "shift"), UNFIT.values(), ids=UNFIT)
def test_modulation_that_does_not_fit_is_refused(scale: Tensor, shift: Tensor | None) -> None:
    with pytest.raises(ObservationError, match="cannot be modulated"):
        cpu_elementwise.normalize(
            0, 1, torch.zeros((2, 3, 8)), scale, shift, eps=1e-6, centred=False
        )


def test_gates_and_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ObservationError, match="a gate of"):
        cpu_elementwise.gate(0, 1, "silu", torch.zeros(2, 3), torch.zeros(2, 4))
    x = torch.zeros((2, 3, 4, 6))
    for shape in [(2, 1, 4, 2), (2, 1, 5, 3), (3, 1, 4, 3), (2, 2, 4, 3)]:
        table = torch.zeros(shape)
        with pytest.raises(ObservationError, match="cannot be rotated"):
            cpu_elementwise.rotate(0, 1, x, table, table)
    with pytest.raises(ResourceError, match="no path"):
        CpuElementwise("avx1024")


def test_the_extension_refuses_sizes_that_do_not_fit() -> None:
    module = cpu.extension()
    path = cpu.path_number(cpu.instruction_sets()[0])
    with pytest.raises(ValueError, match="sizes"):
        module.gate(path, 0, 0, 0, 0, 0, 0, 1, 1, 0)
    with pytest.raises(ValueError, match="sizes"):
        module.normalize(path, 1, 0, 0, 0, 0, 1.0, 0, 0, 0, 1, 1, 1e-6, 0)
    with pytest.raises(ValueError, match="sizes"):
        module.rotate(path, 1, *[0] * 8, -1, 1, 1, 1)
    for function in (module.gate, module.normalize, module.rotate):
        with pytest.raises(TypeError, match="arguments"):
            function(path, 1)


def test_a_layers_gain_and_bias_are_factor_and_addend() -> None:
    own = CpuElementwise(cpu.instruction_sets()[0])
    x, gain, bias = drawn(1, 7, 40), drawn(2, 40), drawn(3, 40)
    torch.testing.assert_close(
        own.layer_norm(x, 1e-6, gain, bias), TORCH.layer_norm(x, 1e-6, gain, bias)
    )
    for base in (0.0, 1.0):
        torch.testing.assert_close(own.rms_norm(x, gain, base), TORCH.rms_norm(x, gain, base))


def test_what_the_kernels_cannot_read_is_computed_as_defined() -> None:
    own = CpuElementwise(cpu.instruction_sets()[0])
    x = drawn(1, 3, 8).double()
    assert torch.equal(own.activate("silu", x), TORCH.activate("silu", x))
    assert torch.equal(own.layer_norm(x, 1e-6), TORCH.layer_norm(x, 1e-6))
    gain = drawn(2, 8).double()
    given = x, 1e-6, gain, gain
    assert torch.equal(own.layer_norm(*given), TORCH.layer_norm(*given))
    assert torch.equal(own.rms_norm(x, gain, 0.0), TORCH.rms_norm(x, gain, 0.0))
    assert torch.equal(own.adaptive_rms_norm(x, gain, gain), TORCH.adaptive_rms_norm(x, gain, gain))
    table = x.cos(), x.sin()
    heads = drawn(3, 3, 16).double()
    assert torch.equal(own.rotate(heads, table), TORCH.rotate(heads, table))


def test_fusing_leaves_nothing_out() -> None:
    """What a layer may ask for and stays PyTorch's on a processor is named."""
    methods = {name for name in vars(Elementwise) if not name.startswith("_")}
    own = {name for name in vars(CpuElementwise) if not name.startswith("_")}
    assert methods - own == {"add_gated", "gated_linears"}


def layers_of(policy: Any) -> list[ElementwiseModule]:
    return [one for one in policy.module.modules() if isinstance(one, ElementwiseModule)]


def kinds_of(policy: Any) -> set[type[Elementwise]]:
    return {type(layer.elementwise) for layer in layers_of(policy)}


def test_a_policy_gives_the_same_bits_on_every_path_and_nearly_those_of_the_reference(
    small_policy: Pi05Policy, few: Observations, noise: np.ndarray, tmp_path: Path
) -> None:
    quantized = oq.quantize(small_policy, few, "rtn")
    assert isinstance(quantized, QuantizedPolicy) and kinds_of(quantized.policy) == {CpuElementwise}
    assert kinds_of(small_policy) == {Elementwise}, "full precision stays PyTorch's"
    wanted = quantized.sample_actions(few[0], noise)
    quantized.save_pretrained(tmp_path / "out")
    for name in cpu.instruction_sets():
        loaded = oq.load(tmp_path / "out", kernel=name)
        assert kinds_of(loaded.policy) == {CpuElementwise}
        assert np.array_equal(loaded.sample_actions(few[0], noise), wanted)
    plain = oq.load(tmp_path / "out", kernel="reference")
    assert kinds_of(plain.policy) == {Elementwise}
    assert np.abs(plain.sample_actions(few[0], noise) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_a_simulation_computes_between_linears_as_integers_do(
    small_policy: Pi05Policy, few: Observations, noise: np.ndarray
) -> None:
    """So what two rows of a comparison differ in is how they round."""
    simulated = oq.quantize(small_policy, few, "omega-paper")
    assert isinstance(simulated, SimulatedPolicy) and kinds_of(simulated.policy) == {CpuElementwise}
    found = simulated.sample_actions(few[0], noise)
    use_elementwise(simulated.policy.module, TORCH)
    plain = simulated.sample_actions(few[0], noise)
    assert np.abs(found - plain).max() < 0.02 * np.abs(plain).max()
